"""Files -> one Arrow file of token ids and labels, and the numbers that planning needs.

Every row is read, judged and tokenised once, before any worker of the training exists, by as many processes as there
are cores, in chunks of bounded memory. Rows keep their full length: how much of them is used is decided later (see
`job.data.split`), when all lengths are known.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.data.bad_rows import BadRows
from job.data.cache import BAD_ROWS, TOKENS, load_entry, make_key, new_entry, save_facts
from job.data.encode_chunk import EncodedChunk, Task
from job.data.encoding.tokens import NOT_SUPERVISED
from job.data.pool import Encoders
from job.data.reading.files import Row, SourceFile, read_chunks
from job.data.reading.rows import Chunk
from job.data.shaping.shapes import RowFormat, RowOptions, find_format
from job.data.statistics import Statistics, TokenizedData
from job.errors import DataError
from job.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizedData", "tokenize_files"]

# What of a file is looked at to find its format.
FORMAT_ROWS = 100
FORMAT_CHUNKS = 4
SHOWN_NAMES = 20

Report = Callable[[int, int], None]


def tokenize_files(
    files: Sequence[SourceFile],
    tokenizer: "PreTrainedTokenizerBase",
    options: RowOptions,
    *,
    folder: Path,
    encoders: Encoders,
    report: Report,
) -> TokenizedData:
    """Tokenise every row of `files` into an Arrow file in `folder`, or find there what was made of the same before.

    `folder` keeps the result of one data set: another one's is removed. `report` is called now and then with the rows
    and bytes read so far. Rows that can't be used are counted and listed, not raised.

    Raises DataError when a file can't be read, its columns are unknown, the chat template does not fit, or there is no
    row at all; ConfigError when the options do not fit the files; ResourcesError when one of the
    `encoders` runs out of memory; OSError when the disk is full.
    """
    key = make_key(files, tokenizer, options)
    entry = folder / key
    if (known := load_entry(entry)) is not None:
        logger.info("tokenized before: reusing %s", entry)
        return known
    encoders.start(sum(file.path.stat().st_size for file in files))
    formats: list[RowFormat | None] = []
    statistics = Statistics()
    with new_entry(entry) as unfinished:
        tasks = _make_tasks(files, options, formats)
        with (
            closing(encoders.encode(tasks, tokenizer)) as chunks,
            BadRows(unfinished / BAD_ROWS) as bad,
            _open_writer(unfinished / TOKENS) as writer,
        ):
            for chunk in chunks:
                _write(writer, chunk)
                bad.add(chunk.bad_rows)
                statistics.add(chunk)
                report(statistics.rows_read, statistics.read_bytes)
        names = tuple(file.name for file in files)
        if statistics.rows_read == 0:
            raise DataError(
                f"no rows in {', '.join(names[:SHOWN_NAMES]) or 'no files'}",
                hint="check what wrote them, and that SFT_DATA__URI (or SFT_DATA__EVAL_URI) names the right files",
            )
        data = _describe(entry, names, tuple(formats), statistics, bad)
        save_facts(data, unfinished)
    return data


def _make_tasks(files: Sequence[SourceFile], options: RowOptions, formats: list[RowFormat | None]) -> Iterator[Task]:
    """Yield the chunks of all files; append each file's format, None if it has no readable row, to `formats`."""
    for index, file in enumerate(files):
        chunks = read_chunks(file.path, file.name)
        row_format = None
        while row_format is None and (head := list(islice(chunks, FORMAT_CHUNKS))):
            row_format = _find_format(head, file.name, options)
            yield from (Task(index, chunk, row_format) for chunk in head)
        formats.append(row_format)
        yield from (Task(index, chunk, row_format) for chunk in chunks)


def _find_format(head: list[Chunk], name: str, options: RowOptions) -> RowFormat | None:
    # More than one row, because the first may be the one that lacks a column.
    rows = (row for chunk in head for row in chunk.read() if isinstance(row, Row))
    columns = [row.values.keys() for row in islice(rows, FORMAT_ROWS)]
    return find_format(set().union(*columns), name, options) if columns else None


def _describe(
    entry: Path, names: tuple[str, ...], formats: tuple[RowFormat | None, ...], statistics: Statistics, bad: BadRows
) -> TokenizedData:
    return TokenizedData(
        path=entry / TOKENS,
        names=names,
        rows_per_file=tuple(statistics.rows_per_file[index] for index in range(len(names))),
        formats=formats,
        lengths_tokens=np.frombuffer(statistics.lengths, dtype=np.int32),
        supervised_tokens=np.frombuffer(statistics.supervised, dtype=np.int32),
        first_supervised=np.frombuffer(statistics.first, dtype=np.int32),
        digests=np.frombuffer(statistics.digests, dtype=np.uint64),
        eos_supervised_rows=statistics.eos_rows,
        end_token_rows=dict(statistics.end_token_rows),
        rows_with=dict(statistics.rows_with),
        rows_read=statistics.rows_read,
        bad_rows=bad.count,
        bad_reasons=dict(bad.reasons),
        shown_bad_rows=tuple(bad.shown),
        bad_rows_path=entry / BAD_ROWS,
    )


@contextmanager
def _open_writer(path: Path) -> Iterator[Any]:
    """Open an Arrow IPC file. Uncompressed, so that every worker process can map the one file and share its pages."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _schema()) as writer:
        yield writer


def _schema() -> Any:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    return pa.schema([("input_ids", tokens), ("labels", tokens), ("file", pa.int32()), ("line", pa.int64())])


def _write(writer: Any, chunk: EncodedChunk) -> None:
    import pyarrow as pa

    rows = len(chunk.lengths)
    if rows == 0:
        return
    ends = pa.array(np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32))
    labels = np.where(chunk.supervised, chunk.input_ids, np.int32(NOT_SUPERVISED))
    columns = [
        pa.ListArray.from_arrays(ends, pa.array(chunk.input_ids)),
        pa.ListArray.from_arrays(ends, pa.array(labels)),
        pa.array(np.full(rows, chunk.file, dtype=np.int32)),
        pa.array(chunk.numbers),
    ]
    writer.write_batch(pa.record_batch(columns, schema=_schema()))
