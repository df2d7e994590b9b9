"""The X-ray of the data as text, for a log or a terminal."""

import unicodedata
from collections.abc import Iterator, Sequence

from job.data import Lengths, Piece, TurnEnd, XRay
from job.log import Terminal

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
    sections = {
        "Rows": _describe_rows(xray),
        "Files": _describe_files(xray),
        "Tokens": [
            f"{xray.tokens:,} to train on, {xray.supervised_tokens:,} of them supervised "
            f"({xray.supervised_tokens / xray.tokens:.0%})"
        ],
        "Lengths": [*_describe_lengths(xray), *_draw_histogram(xray.lengths, bars)],
        "Stops": _describe_turn_end(xray.turn_end, xray.kept),
        "Copies": [
            f"{xray.duplicates:,} rows repeat another; {xray.held_out_in_train:,} of {xray.held_out:,} held-out rows "
            "are trained on"
        ],
    }
    lines = []
    for label, texts in sections.items():
        wrapped = [line for text in texts for line in _wrap(text, terminal.width - _LABEL_WIDTH)]
        lines += [f"{label if index == 0 else '':<{_LABEL_WIDTH}}{line}" for index, line in enumerate(wrapped)]
    how = f"{_GREEN}green{_PLAIN}" if terminal.has_colour else "in [[ ]]"
    lines.append(f"First rows, what is supervised {how}:")
    for number, sample in enumerate(xray.samples, start=1):
        lines += _draw_sample(number, sample, terminal)
    return "\n".join(lines)


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
        first, *others = _make_visible(piece.text).split("\n")
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
        text = _cut(piece.text, room)
        if text:
            drawn += f"{before}{text}{after}"
            width = room - _columns(text)
    return drawn


def _make_visible(text: str) -> str:
    """Replace control characters, which could clear a terminal or forge a line of the log."""
    return "".join(
        character if character == "\n" or unicodedata.category(character) != "Cc" else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return "    " if character == "\t" else f"\\x{ord(character):02x}"


def _columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: two for a wide character, such as most of CJK."""
    return sum(_character_columns(character) for character in text)


def _character_columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, width: int) -> str:
    """Cut a text's middle out, so that it takes so many columns: the end of an answer shows what ends it."""
    if _columns(text) <= width:
        return text
    if width < 4:
        return ""
    tail = _take(text[::-1], (width - 3) // 3)[::-1]
    return f"{_take(text, width - 3 - _columns(tail))}...{tail}"


def _take(text: str, width: int) -> str:
    """Return as much of a text's start as fits into so many columns."""
    used = 0
    for index, character in enumerate(text):
        used += _character_columns(character)
        if used > width:
            return text[:index]
    return text


def _wrap(text: str, width: int) -> Iterator[str]:
    """Break a text between words into lines of at most so many columns; a longer word has a line of its own."""
    line = ""
    for word in text.split(" "):
        if line and _columns(line) + 1 + _columns(word) > width:
            yield line
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield line
