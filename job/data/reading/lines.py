"""Text files as blocks of whole lines, plain or compressed, without ever holding a whole file.

Lines stay bytes here, because one line of bad UTF-8 must cost one row and not the file.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.reading.rows import CHUNK_BYTES
from job.errors import DataError

# No conversation is that long; a file without line feeds must not fill the memory.
MAX_LINE_BYTES = 16 << 20
_KEPT_OF_LONG_LINE_BYTES = 1_000


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive lines, the first of them line `number` of its file; or the beginning of one that is too long."""

    number: int
    data: bytes
    is_too_long: bool = False

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (1-based number, line without its line feed)."""
        # Only a line feed ends a line: splitlines would also cut at a carriage return.
        yield from enumerate(self.data.removesuffix(b"\n").split(b"\n"), start=self.number)


def read_blocks(path: Path, name: str, compression: str | None) -> Iterator[Block]:
    """Yield the lines of a text, some CHUNK_BYTES at a time; a byte order mark at the start is dropped.

    `compression` is None, "gzip" or "zstd". A line longer than MAX_LINE_BYTES is skipped with flat memory and stands
    alone in its block. Raises DataError when the compressed stream is damaged or cut off, or the text is UTF-16.
    """
    number = 1
    for data, is_too_long in _join_lines(_read_chunks(path, name, compression)):
        if number == 1:
            _check_encoding(data, name)
            data = data.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
        if data:
            yield Block(number, data, is_too_long)
        number += 1 if is_too_long else data.count(b"\n")


def read_document(path: Path, name: str, compression: str | None, max_bytes: int) -> str:
    """Return a whole text. Raises DataError as `read_blocks` does, for more than `max_bytes`, and for bad UTF-8."""
    pieces: list[bytes] = []
    size_bytes = 0
    for piece in _read_chunks(path, name, compression):
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes > max_bytes:
            raise DataError(
                f"{name}: a JSON document of more than {max_bytes >> 20} MiB, which has to be read as a whole",
                hint="write it as JSON lines, one object a line, and name it .jsonl: that is read piece by piece",
            )
    data = b"".join(pieces)
    pieces.clear()
    _check_encoding(data, name)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not valid UTF-8: {error.reason}", hint="save the file as UTF-8") from error


def _check_encoding(start: bytes, name: str) -> None:
    # Without a byte order mark, one of its first two bytes is a NUL: UTF-16 of a brace, a bracket or a column's name.
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:2].count(0) == 1:
        raise DataError(f"{name}: the file is UTF-16", hint="save it as UTF-8")


def _join_lines(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield (whole lines, False), or (the beginning of a line, True) for one that is too long."""
    unfinished: list[bytes] = []  # the beginning of the line that the next chunk goes on with
    size_bytes = 0  # of that line; more than is in `unfinished` once it is too long
    for chunk in chunks:
        first, last = chunk.find(b"\n") + 1, chunk.rfind(b"\n") + 1
        size_bytes += first or len(chunk)
        if size_bytes <= MAX_LINE_BYTES:
            unfinished.append(chunk[:last] if last else chunk)
            if last:
                yield b"".join(unfinished), False
        elif last:
            yield b"".join(unfinished)[:_KEPT_OF_LONG_LINE_BYTES], True
            if first < last:
                yield chunk[first:last], False
        if last:
            unfinished = [chunk[last:]]
            size_bytes = len(chunk) - last
    if size_bytes > MAX_LINE_BYTES:
        yield b"".join(unfinished)[:_KEPT_OF_LONG_LINE_BYTES], True
    elif size_bytes:
        yield b"".join(unfinished), False


def _read_chunks(path: Path, name: str, compression: str | None) -> Iterator[bytes]:
    if compression is None:
        with path.open("rb") as plain:
            while chunk := plain.read(CHUNK_BYTES):
                yield chunk
        return
    import pyarrow as pa

    if path.stat().st_size == 0:
        # pyarrow takes it for an empty text, but no compressor writes nothing: an upload broke off.
        raise DataError(f"{name}: an empty file is not a {compression} file", hint="upload it again")
    with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, compression) as stream:
        while chunk := _read_compressed(stream, name, compression):
            yield chunk


def _read_compressed(stream: Any, name: str, compression: str) -> bytes:
    import pyarrow as pa

    try:
        data: bytes = stream.read(CHUNK_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: the {compression} file is damaged or cut off: {error}", hint="upload it again"
        ) from error
    return data
