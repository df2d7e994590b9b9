"""The X-ray of the data as text, for a log or a terminal."""

from collections.abc import Iterator, Sequence

from job.data import Lengths, Piece, TurnEnd, XRay
from job.log import Terminal
from job.report.columns import count_columns, cut, make_visible, wrap

_LABEL_WIDTH = 12
_SAMPLE_LINES = 12  # of each row
_MAX_FILES = 10
_GREEN, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_MARKS = {True: (_GREEN, _PLAIN), False: ("[[", "]]")}  # of supervised text, with colour or without


def format_xray(xray: XRay, terminal: Terminal) -> str:
    """Return what is read, used and learned, in lines of at most the terminal's width.

    What is supervised in the examples is green, or stands in [[double brackets]] where there is no colour.
    """
    bars = max(10, min(50, terminal.width - _LABEL_WIDTH - 24))
    sections = describe_xray(xray)
    sections["Lengths"] += _draw_histogram(xray.lengths, bars)
    lines: list[str] = []
    for label, texts in sections.items():
        wrapped = [line for text in texts for line in wrap(text, terminal.width - _LABEL_WIDTH)]
        lines += [f"{label if index == 0 else '':<{_LABEL_WIDTH}}{line}" for index, line in enumerate(wrapped)]
    how = f"{_GREEN}green{_PLAIN}" if terminal.has_colour else "in [[ ]]"
    lines.append(f"First rows, what is supervised {how}:")
    for number, sample in enumerate(xray.samples, start=1):
        lines += _draw_sample(number, sample, terminal)
    return "\n".join(lines)


def describe_xray(xray: XRay) -> dict[str, list[str]]:
    """Return what there is to say of the rows, by subject; each text is a sentence or a list of numbers."""
    return {
        "Rows": _describe_rows(xray),
        "Files": _describe_files(xray),
        "Tokens": [
            f"{xray.tokens:,} to train on, {xray.supervised_tokens:,} of them supervised "
            f"({xray.supervised_tokens / xray.tokens:.0%})"
        ],
        "Lengths": _describe_lengths(xray),
        "Stops": _describe_turn_end(xray.turn_end, xray.kept),
        "Copies": [
            f"{xray.duplicates:,} rows repeat another; {xray.held_out_in_train:,} of {xray.held_out:,} held-out rows "
            "are trained on"
        ],
    }


def _describe_rows(xray: XRay) -> list[str]:
    lines = [f"{xray.read:,} read, {xray.kept:,} can be used; {xray.train:,} to train on, {xray.held_out:,} held out"]
    lines += [f"{rows:,} skipped: {reason}" for reason, rows in xray.skipped.items()]
    return lines


def _describe_files(xray: XRay) -> list[str]:
    lines = []
    for file in xray.files[:_MAX_FILES]:
        weight = "" if file.weight == 1 else f", weight {file.weight:g}"
        lines.append(f"{file.name}: {file.rows:,} rows{weight}, {file.format}")
    if more := len(xray.files) - _MAX_FILES:
        lines += [f"and {more:,} more files"] if more > 0 else []
    return lines


def _describe_lengths(xray: XRay) -> list[str]:
    lengths, too_long = xray.lengths, xray.too_long
    lines = [
        f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, max {lengths.max:,} tokens a row; "
        f"max_length {xray.max_length_tokens:,}"
    ]
    if too_long.rows:
        lines.append(
            f"{too_long.rows:,} rows are longer ({xray.truncation}): {too_long.lost_tokens:,} tokens lost, "
            f"{too_long.lost_supervised_tokens:,} of them supervised"
        )
    return lines


def _draw_histogram(lengths: Lengths, width: int) -> Iterator[str]:
    most = max(rows for _, rows in lengths.histogram)
    edge_width = len(f"{lengths.histogram[-1][0]:,}")
    for edge, rows in lengths.histogram:
        bar = "█" * round(width * rows / most) if rows else ""
        yield f"to {edge:>{edge_width},} {bar or ('▏' if rows else '')} {rows:,}"


def _describe_turn_end(end: TurnEnd, rows: int) -> list[str]:
    stops = " or ".join(end.stop_tokens) or "no token"
    lines = [f"{end.rows_that_stop:,} of {rows:,} rows teach {stops}, which generation stops at"]
    lines += [
        f"{count:,} rows end in {token}, which generation does not stop at"
        for token, count in end.rows_by_token.items()
        if token not in end.stop_tokens
    ]
    if end.pad_token in end.stop_tokens:
        lines.append(
            f"{end.pad_token} is the padding too: padding is masked by place, not by token, so "
            f"all {end.rows_that_stop:,} rows still teach it"
        )
    return lines


def _draw_sample(number: int, sample: Sequence[Piece], terminal: Terminal) -> list[str]:
    """Return a row's text line by line, cut to the width, with the supervised part marked anew on each line."""
    lines: list[list[Piece]] = [[]]
    for piece in sample:
        first, *others = make_visible(piece.text).split("\n")
        lines[-1].append(Piece(first, piece.supervised))
        lines += [[Piece(text, piece.supervised)] for text in others]
    if not any(piece.text for piece in lines[-1]):
        lines.pop()
    left_out = len(lines) - _SAMPLE_LINES
    gutter = f"{number:>2} "
    drawn = [
        f"{gutter if index == 0 else '   '}│ {_draw_line(line, terminal, terminal.width - 5)}"
        for index, line in enumerate(lines[:_SAMPLE_LINES])
    ]
    return drawn + ([f"   │ ({left_out} more lines)"] if left_out > 0 else [])


def _draw_line(pieces: Sequence[Piece], terminal: Terminal, width: int) -> str:
    drawn = ""
    for piece in pieces:
        before, after = ("", "") if not piece.supervised else _MARKS[terminal.has_colour]
        room = width - (0 if terminal.has_colour else len(before) + len(after))
        text = cut(piece.text, room)
        if text:
            drawn += f"{before}{text}{after}"
            width = room - count_columns(text)
    return drawn
