"""What a data file gives: rows, rows that can't be read, and chunks of records that are cheap to make and to send."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

CHUNK_BYTES = 1 << 20  # tokenising needs some hundred bytes for each byte of text, so chunks are small


@dataclass(frozen=True, slots=True)
class Row:
    """One readable row: its file's name, its number (see `read_rows`) and its columns.

    `line` is the text that it was read from, where that is one line of JSON.
    """

    name: str
    number: int
    values: dict[str, Any]
    line: bytes | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """Return the row as JSON: the line that it was read from, or its columns."""
        if self.line is not None:
            return self.line.decode("utf-8").strip()
        return dump_json(self.values)


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that can't be used, and why. `content` is what it holds, as JSON: a value, or a string of its text."""

    name: str
    number: int
    reason: str
    content: str = field(default="null", compare=False, repr=False)


class Chunk(Protocol):
    """Consecutive records of one file, parsed only when `read` is called, which another process may do."""

    @property
    def size_bytes(self) -> int:
        """About the bytes of data in it."""
        ...

    def read(self) -> Iterator[Row | BadRow]:
        """Yield its rows, in order."""
        ...


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Records of a format that can only be read from its start to its end, so they are parsed already."""

    rows: list[Row | BadRow]
    size_bytes: int

    def read(self) -> Iterator[Row | BadRow]:
        """Yield the rows."""
        yield from self.rows


def pack_rows(rows: Iterator[tuple[Row | BadRow, int]]) -> Iterator[RowChunk]:
    """Join rows, each with its size in bytes, to chunks of about CHUNK_BYTES."""
    packed: list[Row | BadRow] = []
    total_bytes = 0
    for row, size_bytes in rows:
        packed.append(row)
        total_bytes += size_bytes
        if total_bytes >= CHUNK_BYTES:
            yield RowChunk(packed, total_bytes)
            packed, total_bytes = [], 0
    if packed:
        yield RowChunk(packed, total_bytes)


def dump_json(value: Any) -> str:
    """Return a row's columns as JSON, or as a JSON string of what Python shows where JSON has no word for them."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except (ValueError, TypeError, RecursionError):  # NaN, a key that is no string, endless nesting
        return dump_text(repr(value))


def dump_text(text: str | bytes) -> str:
    r"""Return a text as a JSON string; of bytes, those that are not UTF-8 as `\xff`."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return json.dumps(text, ensure_ascii=False)


def json_type(value: Any) -> str:
    """Name a value's type as JSON calls it: null, boolean, number, string, list, object (else by Python's name)."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", bytes: "byte string"}
    names |= {list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
