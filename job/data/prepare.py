"""Files -> one Arrow file of token ids and labels, and the numbers that planning needs.

Every row is read, judged and tokenised once, in the parent process, in batches of bounded memory. Rows keep their full
length: how much of them is used is decided later (see `job.data.split`), when all lengths are known.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from job.data.files import BadRow, Row, read_rows
from job.data.render import find_template
from job.data.shapes import (
    Example,
    FatalRowError,
    LossOn,
    PlainExample,
    RowError,
    Shape,
    check_loss_on,
    find_shape,
    to_example,
)
from job.data.tokens import NOT_SUPERVISED, Encoded, encode_batch, find_closing_tokens
from job.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1_000
# Tokenising needs some hundred bytes a character, so long documents make smaller batches.
BATCH_CHARACTERS = 2_000_000
SHAPE_ROWS = 100
SHOWN_BAD_ROWS = 20


@dataclass(frozen=True)
class TokenizedData:
    """A tokenised data set of N rows: the Arrow file at `path`, and what is known of its rows.

    The file's columns: input_ids and labels (lists of int32, labels -100 = not supervised), file (int32, an index into
    `names`) and line (int64). A label at position 0 is never predicted, so it is counted nowhere here.
    """

    path: Path
    names: tuple[str, ...]
    rows_per_file: tuple[int, ...]
    shapes: tuple[Shape | None, ...]  # None for a file without rows
    lengths_tokens: NDArray[np.int64]  # (N,)
    supervised_tokens: NDArray[np.int64]  # (N,)
    first_supervised: NDArray[np.int64]  # (N,) index of the first supervised token, at least 1
    eos_supervised_rows: int  # rows in which EOS is learned
    end_token_rows: dict[int, int]  # rows by the special or added token that their supervised text ends with


@dataclass
class _BadRows:
    """How many rows can't be used, and the first few, so that a million of them cost no memory."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, name: str, number: int, reason: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_BAD_ROWS:
            self.shown.append(f"{name}:{number}: {reason}")


@dataclass
class _Statistics:
    """What is known of the rows so far; 24 bytes a row."""

    eos_id: int | None
    closing: dict[int, str]
    # Quoted: array takes no type arguments at run time before Python 3.12.
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    supervised: "array[int]" = field(default_factory=lambda: array("q"))
    first: "array[int]" = field(default_factory=lambda: array("q"))
    eos_rows: int = 0
    end_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, row: Encoded) -> bool:
        """Count one row, unless it has no supervised token; say whether it has."""
        positions = np.flatnonzero(row.labels[1:] != NOT_SUPERVISED) + 1
        if len(positions) == 0:
            return False
        self.lengths.append(len(row.labels))
        self.supervised.append(len(positions))
        self.first.append(int(positions[0]))
        self.eos_rows += bool(np.any(row.labels[1:] == self.eos_id))
        last = int(row.labels[positions[-1]])
        if last in self.closing:
            self.end_tokens[last] += 1
        return True


def tokenize_files(
    files: Sequence[tuple[Path, str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn,
    target: Path,
    report: Callable[[int], None],
) -> TokenizedData:
    """Tokenise every row of `files` ((path, name to show) each) into an Arrow file at `target`.

    `report` is called now and then with the number of rows read so far. Raises DataError when a file can't be read, its
    columns are unknown, the chat template does not fit, there is no row at all, or any row is bad: then the message
    counts the bad rows and shows the first 20 as `file:line: reason`. Raises ConfigError when `loss_on` does not fit.
    """
    statistics = _Statistics(tokenizer.eos_token_id, find_closing_tokens(tokenizer))
    bad = _BadRows()
    progress = _Progress(report)
    shapes: list[Shape | None] = []
    rows_per_file: list[int] = []
    with _open_writer(target) as writer:
        for index, (path, name) in enumerate(files):
            kept_before = len(statistics.lengths)
            rows = progress.follow(read_rows(path, name))
            shape, head = _find_file_shape(rows, name, bad)
            shapes.append(shape)
            if shape is not None:
                check_loss_on(shape, loss_on, name)
                examples = _make_examples(chain(head, rows), shape, loss_on, tokenizer, bad)
                for batch in _make_batches(examples):
                    _write(writer, index, _encode_rows(batch, name, tokenizer, statistics, bad))
            rows_per_file.append(len(statistics.lengths) - kept_before)
        report(progress.rows)
        _check(bad, progress.rows, [name for _, name in files])
    return TokenizedData(
        path=target,
        names=tuple(name for _, name in files),
        rows_per_file=tuple(rows_per_file),
        shapes=tuple(shapes),
        lengths_tokens=np.array(statistics.lengths, dtype=np.int64),
        supervised_tokens=np.array(statistics.supervised, dtype=np.int64),
        first_supervised=np.array(statistics.first, dtype=np.int64),
        eos_supervised_rows=statistics.eos_rows,
        end_token_rows=dict(statistics.end_tokens),
    )


@dataclass
class _Progress:
    """Counts the rows of all files as they are read, good and bad."""

    report: Callable[[int], None]
    rows: int = 0

    def follow(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        for row in rows:
            self.rows += 1
            if self.rows % BATCH_ROWS == 0:
                self.report(self.rows)
            yield row


def _find_file_shape(rows: Iterator[Row | BadRow], name: str, bad: _BadRows) -> tuple[Shape | None, list[Row]]:
    """Read the first good rows of a file and return its shape (None if it has no good row) and those rows."""
    # More than one row, because the first may be the one that lacks a column.
    head: list[Row] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.add(row.name, row.number, row.reason)
            continue
        head.append(row)
        if len(head) == SHAPE_ROWS:
            break
    if not head:
        return None, []
    return find_shape({column for row in head for column in row.values}, name), head


def _make_examples(
    rows: Iterator[Row | BadRow], shape: Shape, loss_on: LossOn, tokenizer: "PreTrainedTokenizerBase", bad: _BadRows
) -> Iterator[tuple[int, Example]]:
    has_template = find_template(tokenizer) is not None
    for row in rows:
        if isinstance(row, BadRow):
            bad.add(row.name, row.number, row.reason)
            continue
        try:
            yield row.number, to_example(row.values, shape, loss_on, has_template=has_template)
        except FatalRowError as error:
            raise _fatal(error, row.name, row.number) from error
        except RowError as error:
            bad.add(row.name, row.number, error.reason)


def _make_batches(examples: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    batch: list[tuple[int, Example]] = []
    characters = 0
    for number, example in examples:
        batch.append((number, example))
        characters += _count_characters(example)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _count_characters(example: Example) -> int:
    if isinstance(example, PlainExample):
        return len(example.text)
    return sum(len(message.content) for message in example.messages)


def _encode_rows(
    batch: list[tuple[int, Example]],
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    statistics: _Statistics,
    bad: _BadRows,
) -> list[tuple[int, Encoded]]:
    kept: list[tuple[int, Encoded]] = []
    encoded = encode_batch([example for _, example in batch], tokenizer)
    for (number, _), row in zip(batch, encoded, strict=True):
        if isinstance(row, FatalRowError):
            raise _fatal(row, name, number) from row
        if isinstance(row, RowError):
            bad.add(name, number, row.reason)
        elif statistics.add(row):
            kept.append((number, row))
        else:
            bad.add(name, number, "no token is left to learn from")
    return kept


def _fatal(error: FatalRowError, name: str, number: int) -> DataError:
    return DataError(f"{name}:{number}: {error.reason}", hint=error.hint)


def _check(bad: _BadRows, rows_read: int, names: Sequence[str]) -> None:
    if rows_read == 0:
        raise DataError(f"no rows in {', '.join(names[:SHOWN_BAD_ROWS]) or 'no files'}", hint="check SFT_DATA__URI")
    if bad.count:
        shown = "\n  ".join(bad.shown)
        more = f"\n  and {bad.count - len(bad.shown):,} more" if bad.count > len(bad.shown) else ""
        raise DataError(
            f"{bad.count:,} of {rows_read:,} rows can't be trained on:\n  {shown}{more}",
            hint="mend or remove these rows",
        )


@contextmanager
def _open_writer(target: Path) -> Iterator[Any]:
    """Open an Arrow IPC file that appears at `target` only when it is whole."""
    import pyarrow as pa

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        # Uncompressed, so that every worker process can map the one file and share its pages.
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, _schema()) as writer:
            yield writer
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _schema() -> Any:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    return pa.schema([("input_ids", tokens), ("labels", tokens), ("file", pa.int32()), ("line", pa.int64())])


def _write(writer: Any, file_index: int, rows: list[tuple[int, Encoded]]) -> None:
    import pyarrow as pa

    if not rows:
        return
    ends = np.cumsum([0, *(len(row.input_ids) for _, row in rows)], dtype=np.int32)
    columns = [
        pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate([row.input_ids for _, row in rows]))),
        pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate([row.labels for _, row in rows]))),
        pa.array(np.full(len(rows), file_index, dtype=np.int32)),
        pa.array([number for number, _ in rows], type=pa.int64()),
    ]
    writer.write_batch(pa.record_batch(columns, schema=_schema()))
