"""Values of a row -> text, lists and tools, or the reason why they aren't.

Notes are what was odd about a value that could be used all the same; a caller gives the list that they are added to.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from job.data.reading.files import json_type
from job.data.shaping.examples import RowError

NUMBER_NOTE = "a number read as text"
# Far below Python's recursion limit, which chat templates that write JSON run into.
MAX_DEPTH = 100


def take(values: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column. Raises RowError when the row lacks the column."""
    if column not in values:
        raise RowError(f"column `{column}` is missing")
    return values[column]


def take_text(values: Mapping[str, Any], column: str, notes: list[str]) -> str:
    """Return a column's text, unchanged. Raises RowError when it is missing or not text (see `to_text`)."""
    return to_text(take(values, column), f"column `{column}`", notes)


def take_answer(values: Mapping[str, Any], column: str, notes: list[str]) -> str:
    """Return a column's text. Raises RowError when it is missing, not text, or blank."""
    text = take_text(values, column, notes)
    check_answer(text, column)
    return text


def take_optional_text(values: Mapping[str, Any], column: str, notes: list[str]) -> str:
    """Return a column's text, empty where it is missing, null or blank. Raises RowError when it is not text."""
    if values.get(column) is None:
        return ""
    text = take_text(values, column, notes)
    return text if text.strip() else ""


def take_tools(values: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools of the `tools` column: a list of objects, or such a list as a JSON string; none where it is
    missing, null or empty. Raises RowError when it holds something else."""
    tools = values.get("tools")
    if tools is None or tools == "":
        return ()
    tools = parse_json(tools) if isinstance(tools, str) else drop_nulls(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("column `tools` is not a list of objects, nor a JSON string of one")
    return tuple(tools)


def to_text(value: Any, where: str, notes: list[str]) -> str:
    """Return text as it is, and a number as its JSON text, with a note.

    Raises RowError, which begins with `where`, for any other type, and for text that no tokenizer can encode.
    """
    if isinstance(value, str):
        check_unicode(value, where)
        return value
    text = number_text(value)
    if text is None:
        raise RowError(f"{where} is {describe_type(value)}, not a string")
    notes.append(NUMBER_NOTE)
    return text


def number_text(value: Any) -> str | None:
    """Return the JSON text of a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN is how data frames write a text that is missing.
    return None if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)


def describe_type(value: Any) -> str:
    """Name a value's JSON type with its article: `a list`, `an object`, `null`, `NaN`."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    kind = json_type(value)
    if kind == "null":
        return kind
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def check_answer(text: str, where: str) -> None:
    """Raise RowError when an answer is blank: there would be nothing to learn."""
    if not text.strip():
        raise RowError(f"{where} is empty")


def check_unicode(text: str, where: str) -> None:
    """Raise RowError when text holds half of a surrogate pair."""
    # "\\ud83d" alone is legal JSON, but no tokenizer can encode half a character.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half of a surrogate pair at character {error.start + 1}") from error


def drop_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth. Raises RowError when it is nested too deeply.

    Arrow gives each object of a column every key that any of them has, null where it had none.
    """
    return _copy(value, keep_nulls=False, depth=0)


def parse_json(text: str) -> Any:
    """Return what a JSON text holds, or None when it isn't JSON. Raises RowError when it is nested too deeply."""
    try:
        return _copy(json.loads(text), keep_nulls=True, depth=0)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError:
        return None


def _copy(value: Any, *, keep_nulls: bool, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, dict):
        return {
            key: _copy(item, keep_nulls=keep_nulls, depth=depth + 1)
            for key, item in value.items()
            if keep_nulls or item is not None
        }
    if isinstance(value, list):
        return [_copy(item, keep_nulls=keep_nulls, depth=depth + 1) for item in value]
    return value


def _too_deep() -> RowError:
    return RowError(f"lists and objects are nested more than {MAX_DEPTH} deep")
