"""Text files as lines of bytes, plain or compressed, without ever holding a whole file.

Lines stay bytes here, because one line of bad UTF-8 must cost one row and not the file.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import DataError

CHUNK_BYTES = 1 << 20


def read_lines(path: Path, name: str, compression: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based number, line with its line feed); a byte order mark at the start is dropped.

    `compression` is None, "gzip" or "zstd". Raises DataError when the compressed stream is damaged or cut off,
    or when the text is UTF-16.
    """
    number = 0
    for number, line in enumerate(_split_lines(_read_chunks(path, name, compression)), start=1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{name}: the file is UTF-16", hint="save it as UTF-8")
            yield 1, line.removeprefix(codecs.BOM_UTF8)
        else:
            yield number, line


def join_text(data: bytes, name: str) -> str:
    """Decode a whole document. Raises DataError with the line of the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not valid UTF-8: {error.reason}", hint="save the file as UTF-8") from error


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # Only a line feed ends a line: str.splitlines would also cut at characters that JSON strings may hold.
    unfinished: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            unfinished.append(piece)
            yield b"".join(unfinished) + b"\n"
            unfinished.clear()
        if rest:
            unfinished.append(rest)
    if unfinished:
        yield b"".join(unfinished)


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
