"""Columnar files (Parquet, Arrow IPC) as rows, a bounded number in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import DataError

BATCH_ROWS = 1_000
_ARROW_FILE_MAGIC = b"ARROW1"


def read_parquet(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
    """Yield each row as a dict, or as a string that says why it can't be read. Raises DataError if damaged."""
    import pyarrow.parquet as pq

    with _name_damage(name, "Parquet"), pq.ParquetFile(str(path)) as file:
        _check_columns(file.schema_arrow.names, name)
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from _convert(batch)


def read_arrow(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
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
        for batch in batches:
            # A file may hold all of its rows in one batch.
            for start in range(0, batch.num_rows, BATCH_ROWS):
                piece = batch.slice(start, BATCH_ROWS)
                # Offsets in a damaged file may point anywhere: look before following them.
                piece.validate(full=True)
                yield from _convert(piece)


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


def _convert(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        # One bad string fails its whole batch: find the rows that hold one.
        rows = [_convert_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    yield from rows


def _convert_row(row: Any) -> dict[str, Any] | str:
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not valid UTF-8: {error.reason}"
    return values
