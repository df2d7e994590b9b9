"""Columnar files (Parquet, Arrow IPC) as chunks of rows, a bounded number in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.reading.rows import CHUNK_BYTES, BadRow, Chunk, Row, dump_text
from job.errors import DataError

MAX_BATCH_ROWS = 1_000
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True, slots=True)
class ArrowChunk:
    """Rows as an Arrow IPC stream of one batch, not converted to Python's values yet; the first is row `number`."""

    name: str
    number: int
    stream: bytes

    @property
    def size_bytes(self) -> int:
        """The bytes of the stream."""
        return len(self.stream)

    def read(self) -> Iterator[Row | BadRow]:
        """Yield its rows as dicts; those with a string that is not UTF-8 as bad rows."""
        import pyarrow as pa

        batch = pa.ipc.open_stream(self.stream).read_next_batch()
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            # One bad string fails its whole batch: find the rows that hold one.
            rows = [_convert_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for number, row in enumerate(rows, start=self.number):
            if isinstance(row, UnicodeDecodeError):
                yield BadRow(self.name, number, f"not valid UTF-8: {row.reason}", dump_text(row.object))
            else:
                yield Row(self.name, number, row)


def read_parquet(path: Path, name: str) -> Iterator[Chunk]:
    """Yield the rows of a Parquet file. Raises DataError if it is damaged or names a column twice."""
    import pyarrow.parquet as pq

    # With a buffer, columns are read as they are needed, and not a whole row group at once.
    with _name_damage(name, "Parquet"), pq.ParquetFile(str(path), buffer_size=CHUNK_BYTES) as file:
        _check_columns(file.schema_arrow.names, name)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        size_bytes = sum(group.total_byte_size for group in groups)
        batch_rows = _rows_for_chunk(file.metadata.num_rows, size_bytes)
        yield from _make_chunks(file.iter_batches(batch_size=batch_rows), name)


def read_arrow(path: Path, name: str) -> Iterator[Chunk]:
    """The same for Arrow's IPC format, both of its kinds: `file` (Feather 2) and `stream` (what `datasets` writes)."""
    import pyarrow as pa

    with path.open("rb") as file:
        is_file = file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    with _name_damage(name, "Arrow"), pa.memory_map(str(path)) as source:
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(source)
            batches = iter(reader)
        _check_columns(reader.schema.names, name)
        yield from _make_chunks(map(_validate, batches), name)


def _validate(batch: Any) -> Any:
    # Offsets in a damaged file may point anywhere: look before following them.
    batch.validate(full=True)
    return batch


@contextmanager
def _name_damage(name: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: the {kind} file is damaged: {error}", hint="upload it again") from error


def _check_columns(names: list[str], name: str) -> None:
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise DataError(f"{name}: the column {', '.join(twice)} is there twice", hint="name every column once")


def _make_chunks(batches: Iterator[Any], name: str) -> Iterator[Chunk]:
    import pyarrow as pa

    number = 1
    for batch in batches:
        # An Arrow file may hold all of its rows in one batch.
        step = _rows_for_chunk(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, piece.schema) as writer:
                writer.write_batch(piece)
            yield ArrowChunk(name, number, sink.getvalue().to_pybytes())
            number += piece.num_rows


def _rows_for_chunk(rows: int, size_bytes: int) -> int:
    """Return how many rows of this average size make a chunk, from 1 to MAX_BATCH_ROWS."""
    return max(1, min(MAX_BATCH_ROWS, rows * CHUNK_BYTES // max(1, size_bytes)))


def _convert_row(row: Any) -> dict[str, Any] | UnicodeDecodeError:
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error
    return values
