"""Data files -> rows, one at a time.

Reads JSON lines, JSON, CSV, TSV, Parquet and Arrow; the text formats also compressed by gzip or zstd. A row that
can't be read is yielded as a `BadRow` with its line, so that a caller can show many of them at once; a file that can't
be read at all raises DataError.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.blocks import read_arrow, read_parquet
from job.data.lines import join_text, read_lines
from job.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
JSON_WHOLE = (".json",)
SEPARATED = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet",)
ARROW = (".arrow", ".feather")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}

_TEXT = (*JSON_LINES, *JSON_WHOLE, *SEPARATED)
READABLE = (*_TEXT, *PARQUET, *ARROW)


@dataclass(frozen=True, slots=True)
class Row:
    """One readable row: its file's name, its number (see `read_rows`) and its columns."""

    name: str
    number: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that could not be read, and why."""

    name: str
    number: int
    reason: str


def is_readable(name: str) -> bool:
    """Say whether `name` ends like a file that `read_rows` reads (`rows.jsonl`, `rows.CSV.gz`, `part-0.parquet`)."""
    ending, compression = _split_ending(name)
    return ending in _TEXT or (ending in READABLE and not compression)


def read_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """Yield the rows of the file at `path`, whose format is told by the ending of `name`.

    `number` is the 1-based line in JSON lines, CSV and TSV (the line on which a record begins) and the 1-based row
    elsewhere. Empty lines are skipped but counted. Only `.json` lists are read whole into memory.
    Raises DataError when the ending is unknown, the file is damaged, or a CSV header or a JSON list is malformed.
    """
    if not is_readable(name):
        endings = ", ".join(READABLE)
        raise DataError(
            f"{name}: not a format that the job reads",
            hint=f"give files that end in {endings}; the text formats may also end in .gz or .zst",
        )
    ending, compression = _split_ending(name)
    if ending in PARQUET:
        yield from _number_rows(read_parquet(path, name), name)
    elif ending in ARROW:
        yield from _number_rows(read_arrow(path, name), name)
    else:
        lines = read_lines(path, name, COMPRESSED.get(compression))
        if ending in SEPARATED:
            yield from _read_separated(lines, name, SEPARATED[ending])
        elif ending in JSON_WHOLE:
            yield from _read_json(lines, name)
        else:
            yield from _read_json_lines(lines, name)


def _split_ending(name: str) -> tuple[str, str]:
    """`x.jsonl.gz` -> (".jsonl", ".gz"); `x.jsonl` -> (".jsonl", "")."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def _number_rows(rows: Iterator[dict[str, Any] | str], name: str) -> Iterator[Row | BadRow]:
    for number, values in enumerate(rows, start=1):
        yield BadRow(name, number, values) if isinstance(values, str) else Row(name, number, values)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _refuse_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not valid JSON")


# One decoder for every row: json.loads with options builds a new one on each call.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse_line(line: bytes, name: str, number: int) -> Row | BadRow:
    try:
        values = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(name, number, f"not valid UTF-8: {error.reason} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        # error.lineno would say 2 where the problem is the end of the line, so the column counts the line's characters.
        return BadRow(name, number, f"not valid JSON: {error.msg}, column {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return BadRow(name, number, f"not valid JSON: {error}")
    if not isinstance(values, dict):
        return BadRow(name, number, f"a JSON {json_type(values)}, not an object")
    return Row(name, number, values)


def _read_json_lines(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[Row | BadRow]:
    for number, line in lines:
        # The line keeps its leading blanks: they count in the column of an error.
        if trimmed := line.rstrip():
            yield _parse_line(trimmed, name, number)


def _read_json(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[Row | BadRow]:
    """Tell apart a list of rows, an object that holds one, and newline-delimited JSON under the wrong name."""
    head: list[tuple[int, bytes]] = []
    for item in lines:
        head.append(item)
        if item[1].strip():
            break
    else:
        return
    first = head[-1][1].strip()
    if not first.startswith(b"["):
        if isinstance(_parse_line(first, name, 1), Row):
            following = next(((number, line) for number, line in lines if line.strip()), None)
            if following is not None:
                yield from _read_json_lines(_chain(head, following, lines), name)
                return
        elif first.startswith(b"{") and first.endswith(b"}"):
            # A first row of JSON lines that is itself broken: every line is judged by itself.
            yield from _read_json_lines(_chain(head, None, lines), name)
            return
    data = b"".join(line for _, line in head) + b"".join(line for _, line in lines)
    yield from _read_document(join_text(data, name), name)


def _chain(
    head: list[tuple[int, bytes]], following: tuple[int, bytes] | None, lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    yield from head
    if following is not None:
        yield following
    yield from lines


def _read_document(text: str, name: str) -> Iterator[Row | BadRow]:
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
        raise DataError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{name}: a JSON {json_type(document)}, not a list of objects")
    lists = [value for value in document.values() if _is_list_of_objects(value)]
    # `messages` is a list of objects too, but it is a column: such an object is itself a row.
    is_row = len(lists) != 1 or "messages" in document or "prompt" in document
    yield from _number_values(iter([document] if is_row else lists[0]), name)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _number_values(values: Iterator[Any], name: str) -> Iterator[Row | BadRow]:
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield Row(name, number, value)
        else:
            yield BadRow(name, number, f"a JSON {json_type(value)}, not an object")


def _iterate_list(text: str, start: int, name: str) -> Iterator[Any]:
    """Decode a JSON list one element at a time: the objects of a large file are never all in memory."""
    position = _skip_blanks(text, start + 1)
    try:
        if text.startswith("]", position):
            position += 1
        else:
            while True:
                value, position = _DECODER.raw_decode(text, position)
                yield value
                position = _skip_blanks(text, position)
                if text.startswith("]", position):
                    position += 1
                    break
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip_blanks(text, position + 1)
        if _skip_blanks(text, position) != len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(error, name) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON after line {text.count(chr(10), 0, position) + 1}: {error}") from error


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _syntax_error(error: json.JSONDecodeError, name: str) -> DataError:
    return DataError(
        f"{name}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}",
        hint="mend the file there, or write one JSON object a line and name it .jsonl: then every bad line is listed",
    )


def json_type(value: Any) -> str:
    """Name a value's type as JSON calls it: null, boolean, number, string, list, object (else Python's own name)."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


# -- CSV and TSV -------------------------------------------------------------------------------------------------------


def _read_separated(lines: Iterator[tuple[int, bytes]], name: str, delimiter: str) -> Iterator[Row | BadRow]:
    # The module's limit is 128 KiB a field, less than one long document.
    csv.field_size_limit(sys.maxsize)
    # Bytes that aren't UTF-8 become surrogates here, so that one bad record doesn't end the file.
    texts = (line.decode("utf-8", "surrogateescape") for _, line in lines)
    # strict: otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{name}:{number}: the header can't be read: {error}") from error
            yield BadRow(name, number, f"not valid {'CSV' if delimiter == ',' else 'TSV'}: {error}")
            continue
        if not fields:
            continue
        if header is None:
            header = _check_header(fields, name, number)
        else:
            yield _make_record(fields, header, name, number)


def _make_record(fields: list[str], header: list[str], name: str, number: int) -> Row | BadRow:
    if len(fields) != len(header):
        return BadRow(name, number, f"{len(fields)} fields, but the header names {len(header)}")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return BadRow(name, number, "not valid UTF-8")
    return Row(name, number, dict(zip(header, fields, strict=True)))


def _check_header(fields: list[str], name: str, number: int) -> list[str]:
    header = [field.strip() for field in fields]
    where = f"{name}:{number}: the header"
    hint = "The first line must name every column once."
    if "" in header:
        raise DataError(f"{where} leaves column {header.index('') + 1} without a name", hint=hint)
    if twice := sorted({field for field in header if header.count(field) > 1}):
        raise DataError(f"{where} names {', '.join(twice)} twice", hint=hint)
    return header
