"""JSON -> rows: one object a line, or a whole document that holds a list of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.reading.lines import MAX_LINE_BYTES, Block, read_blocks, read_document
from job.data.reading.rows import BadRow, Chunk, Row, dump_json, dump_text, json_type, pack_rows
from job.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
_HINT = "mend the file there, or write one JSON object a line and name it .jsonl: then every bad line is listed"


@dataclass(frozen=True, slots=True)
class JsonLines:
    """Lines of JSON, not parsed yet."""

    name: str
    block: Block

    @property
    def size_bytes(self) -> int:
        """The bytes of the lines."""
        return len(self.block.data)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield a row for each line that is not empty."""
        if self.block.is_too_long:
            reason = f"longer than {MAX_LINE_BYTES >> 20} MiB, so it is not read"
            yield BadRow(self.name, self.block.number, reason, dump_text(self.block.data + b" ..."))
            return
        for number, line in self.block.lines():
            # The line keeps its leading blanks: they count in the column of an error.
            if trimmed := line.rstrip():
                yield parse_line(trimmed, self.name, number)


def read_json_lines(path: Path, name: str, compression: str | None) -> Iterator[Chunk]:
    """Yield the lines of a file, unparsed."""
    for block in read_blocks(path, name, compression):
        yield JsonLines(name, block)


def read_json(path: Path, name: str, compression: str | None) -> Iterator[Chunk]:
    """Tell apart a list of rows, an object that holds one, and newline-delimited JSON under the wrong name."""
    if _holds_lines(path, name, compression):
        yield from read_json_lines(path, name, compression)
    else:
        text = read_document(path, name, compression, MAX_DOCUMENT_BYTES)
        if _skip_blanks(text, 0) < len(text):
            yield from pack_rows(_read_document(text, name))


def parse_line(line: bytes, name: str, number: int) -> Row | BadRow:
    """Parse one line of JSON lines."""
    try:
        values = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8: {error.reason} at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        # error.lineno would say 2 where the problem is the end of the line, so the column counts the line's characters.
        reason = f"not valid JSON: {error.msg}, column {error.pos + 1}"
    except _DuplicateKeyError as error:
        reason = str(error)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
    else:
        if isinstance(values, dict):
            return Row(name, number, values, line)
        return BadRow(name, number, f"a JSON {json_type(values)}, not an object", dump_json(values))
    return BadRow(name, number, reason, dump_text(line))


class _DuplicateKeyError(ValueError):
    """An object has a key twice; json itself would take the last one in silence."""


def _refuse_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not valid JSON")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise _DuplicateKeyError(f"the key {twice!r} is there twice in one object")
    return values


# One decoder for every row: json.loads with options builds a new one on each call.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_make_object)


def _holds_lines(path: Path, name: str, compression: str | None) -> bool:
    """Say whether a .json file holds one object a line; of a file with one line, or a long first one, it does not."""
    first = b""
    for block in read_blocks(path, name, compression):
        if block.is_too_long:
            return bool(first)
        for _, line in block.lines():
            if not (text := line.strip()):
                continue
            if text.startswith(b"["):
                return bool(first)
            if first or not isinstance(parse_line(text, name, 1), Row):
                # A first row of JSON lines that is itself broken: every line is judged by itself.
                return bool(first) or (text.startswith(b"{") and text.endswith(b"}"))
            first = text
    return False


def _read_document(text: str, name: str) -> Iterator[tuple[Row | BadRow, int]]:
    """Rows of a whole JSON document: a list of objects, an object that holds exactly one such list, or one row."""
    start = _skip_blanks(text, 0)
    if text.startswith("[", start):
        yield from _number_values(_iterate_list(text, start, name), name)
        return
    try:
        document = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _syntax_error(error, name) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON: {error}", hint=_HINT) from error
    if not isinstance(document, dict):
        raise DataError(f"{name}: a JSON {json_type(document)}, not a list of objects", hint=_HINT)
    lists = [value for value in document.values() if _is_list_of_objects(value)]
    # `messages` is a list of objects too, but it is a column: such an object is itself a row.
    is_row = len(lists) != 1 or not _ROW_COLUMNS.isdisjoint(document)
    values = [document] if is_row else lists[0]
    yield from _number_values(((value, len(text) // len(values)) for value in values), name)


_ROW_COLUMNS = frozenset({"messages", "conversations", "prompt"})


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _number_values(values: Iterator[tuple[Any, int]], name: str) -> Iterator[tuple[Row | BadRow, int]]:
    for number, (value, size_bytes) in enumerate(values, start=1):
        if isinstance(value, dict):
            yield Row(name, number, value), size_bytes
        else:
            reason = f"a JSON {json_type(value)}, not an object"
            yield BadRow(name, number, reason, dump_json(value)), size_bytes


def _iterate_list(text: str, start: int, name: str) -> Iterator[tuple[Any, int]]:
    """Decode a JSON list one element at a time, each with its size: the objects are never all in memory."""
    position = _skip_blanks(text, start + 1)
    try:
        if text.startswith("]", position):
            position += 1
        else:
            while True:
                before = position
                value, position = _DECODER.raw_decode(text, position)
                yield value, position - before
                position = _skip_blanks(text, position)
                if text.startswith("]", position):
                    position += 1
                    break
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip_blanks(text, position + 1)
        position = _skip_blanks(text, position)
        if position != len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(error, name) from error
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, position) + 1
        raise DataError(f"{name}:{line}: not valid JSON: {error}", hint=_HINT) from error


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _syntax_error(error: json.JSONDecodeError, name: str) -> DataError:
    return DataError(
        f"{name}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}",
        hint=_HINT,
    )
