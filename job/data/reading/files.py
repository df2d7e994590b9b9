"""Data files -> rows, in chunks of bounded memory.

Reads JSON lines, JSON, CSV, TSV, Parquet and Arrow; the text formats also compressed by gzip or zstd. A row that
can't be read is yielded as a `BadRow` with its line, so that a caller can show many of them at once; a file that can't
be read at all raises DataError.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from job.data.reading.blocks import read_arrow, read_parquet
from job.data.reading.json_rows import read_json, read_json_lines
from job.data.reading.rows import BadRow, Chunk, Row, json_type
from job.data.reading.separated import read_separated
from job.errors import DataError

__all__ = ["BadRow", "Chunk", "Row", "SourceFile", "is_readable", "json_type", "read_chunks", "read_rows"]

JSON_LINES = (".jsonl", ".ndjson")
JSON_WHOLE = (".json",)
SEPARATED = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet",)
ARROW = (".arrow", ".feather")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}

_TEXT = (*JSON_LINES, *JSON_WHOLE, *SEPARATED)
READABLE = (*_TEXT, *PARQUET, *ARROW)


class SourceFile(NamedTuple):
    """A data file on the disk, the name that messages give it and that tells its format, and its content's digest."""

    path: Path
    name: str
    sha256: str


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
    for chunk in read_chunks(path, name):
        yield from chunk.read()


def read_chunks(path: Path, name: str) -> Iterator[Chunk]:
    """The same as chunks of about a mebibyte, which leave to their reader what can be done in another process."""
    if not is_readable(name):
        endings = ", ".join(READABLE)
        raise DataError(
            f"{name}: not a format that the job reads",
            hint=f"give files that end in {endings}; the text formats may also end in .gz or .zst",
        )
    ending, compressed = _split_ending(name)
    compression = COMPRESSED.get(compressed)
    if ending in PARQUET:
        return read_parquet(path, name)
    if ending in ARROW:
        return read_arrow(path, name)
    if ending in SEPARATED:
        return read_separated(path, name, compression, SEPARATED[ending])
    if ending in JSON_WHOLE:
        return read_json(path, name, compression)
    return read_json_lines(path, name, compression)


def _split_ending(name: str) -> tuple[str, str]:
    """`x.jsonl.gz` -> (".jsonl", ".gz"); `x.jsonl` -> (".jsonl", "")."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""
