"""Where data is refused, and what is only warned of: the limits have settings, and every message has its number."""

from collections.abc import Callable
from pathlib import Path

from job.data import Selection, TokenizedData, XRay
from job.errors import DataError
from job.log import logger
from job.settings_groups import DataSettings

_SHOWN_REASONS = 3
_FEW_SUPERVISED = 0.02  # of the tokens


def refuse_bad_rows(
    data: TokenizedData, settings: DataSettings, setting: str, keep_bad_rows: Callable[[Path], str]
) -> None:
    """Raise DataError when rows can't be used and may not be skipped, or are too many to be skipped."""
    if not data.bad_rows:
        return
    share = data.bad_rows / data.rows_read
    counted = f"{data.bad_rows:,} of {data.rows_read:,} rows can't be trained on"
    none_left = data.bad_rows == data.rows_read
    if settings.bad_rows == "skip" and share <= settings.max_bad_fraction and not none_left:
        reasons = [f"{count:,}: {reason}" for reason, count in list(data.bad_reasons.items())[:_SHOWN_REASONS]]
        logger.warning("%s: %s, and are set aside in quarantine.jsonl (%s)", setting, counted, "; ".join(reasons))
        return
    shown = "\n  ".join(data.shown_bad_rows)
    more = data.bad_rows - len(data.shown_bad_rows)
    shown += f"\n  and {more:,} more" if more else ""
    place = keep_bad_rows(data.bad_rows_path)
    if none_left:
        raise DataError(
            f"{setting}: none of the {data.rows_read:,} rows can be trained on:\n  {shown}",
            hint=f"mend these rows (all of them are in {place}), or the settings that say how rows are read",
        )
    if settings.bad_rows == "skip":
        raise DataError(
            f"{setting}: {counted}, {share:.1%}, and SFT_DATA__MAX_BAD_FRACTION={settings.max_bad_fraction:g} allows "
            f"no more than {settings.max_bad_fraction:.1%}:\n  {shown}",
            hint=f"mend these rows (all of them are in {place}), or raise SFT_DATA__MAX_BAD_FRACTION",
        )
    raise DataError(
        f"{setting}: {counted}:\n  {shown}",
        hint=f"mend or remove these rows (all of them are in {place}), or set SFT_DATA__BAD_ROWS=skip",
    )


def refuse_dropped_rows(
    selection: Selection, data: TokenizedData, settings: DataSettings, max_length: int, setting: str
) -> None:
    """Raise DataError when too many rows, or all, are too long to be used."""
    too_long, total = selection.too_long, len(data.lengths_tokens)
    dropped = too_long.left_out + too_long.left_out_unsupervised
    if not dropped:
        return
    why = (
        f"are longer than {max_length} tokens"
        if too_long.left_out
        else f"have nothing of what is supervised within {max_length} tokens"
    )
    remedy = "raise SFT_DATA__MAX_LENGTH"
    remedy += ", or set SFT_DATA__TRUNCATION=split" if settings.truncation != "split" else ""
    if len(selection.segments) == 0:
        raise DataError(
            f"{setting}: none of the {total:,} rows can be used: all {why}, the shortest has "
            f"{data.lengths_tokens.min()}",
            hint=remedy,
        )
    if dropped / total > settings.max_dropped_fraction:
        raise DataError(
            f"{setting}: {dropped:,} of {total:,} rows, {dropped / total:.1%}, {why}, and "
            f"SFT_DATA__MAX_DROPPED_FRACTION={settings.max_dropped_fraction:g} allows no more than "
            f"{settings.max_dropped_fraction:.1%} to be left out",
            hint=f"{remedy}, or raise SFT_DATA__MAX_DROPPED_FRACTION",
        )


def find_warnings(xray: XRay) -> list[str]:
    """Return what is probably wrong with data that can be trained on, each with its number."""
    found = []
    too_long, end = xray.too_long, xray.turn_end
    if too_long.rows:
        found.append(_describe_too_long(xray))
    if end.adopted:
        found.append(
            f"{end.rows_by_token[end.adopted]:,} of {xray.kept:,} rows end in {end.adopted}, and generation with this "
            f"model stops at {' or '.join(end.stop_tokens) or 'no token'}: {end.adopted} becomes the EOS of the "
            "published tokenizer, so serve the adapter with that tokenizer"
        )
    unended = xray.kept - end.rows_that_stop
    if unended and not end.adopted:
        found.append(
            f"{unended:,} of {xray.kept:,} rows don't end in {' or '.join(end.stop_tokens) or 'an EOS token'}, which "
            "generation stops at: the model won't learn from them to stop"
        )
    if xray.held_out == 0:
        found.append("no rows are held out, so nothing shows whether the adapter learned or memorised")
    if xray.held_out_in_train:
        found.append(
            f"{xray.held_out_in_train:,} of {xray.held_out:,} held-out rows are trained on as well: the held-out loss "
            "flatters the adapter"
        )
    if xray.duplicates:
        found.append(f"{xray.duplicates:,} of {xray.kept:,} rows repeat another row")
    share = xray.supervised_tokens / xray.tokens
    if share < _FEW_SUPERVISED:
        found.append(
            f"only {share:.1%} of the tokens are supervised ({xray.supervised_tokens:,} of {xray.tokens:,}): little is "
            "learned for the time that it takes"
        )
    found += [f"{rows:,} of {xray.kept:,} rows hold {oddity}" for oddity, rows in xray.with_oddity.items()]
    return found


def _describe_too_long(xray: XRay) -> str:
    too_long = xray.too_long
    parts = {
        "left out": too_long.left_out,
        "left out, for nothing that is supervised would be left": too_long.left_out_unsupervised,
        "cut off": too_long.cut,
        "split": too_long.split,
    }
    what = ", ".join(f"{rows:,} {name}" for name, rows in parts.items() if rows)
    return (
        f"{too_long.rows:,} of {xray.kept:,} rows are longer than {xray.max_length_tokens} tokens: {what}; "
        f"{too_long.lost_tokens:,} tokens are lost, {too_long.lost_supervised_tokens:,} of them supervised"
    )
