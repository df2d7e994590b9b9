"""A chunk of records -> token ids in compact arrays, their numbers and the rows that can't be used.

This is the work that is done for every row. It needs nothing but the chunk, so any process can do it.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.data.encoding.render import find_template
from job.data.encoding.tokens import NOT_SUPERVISED, BatchEncoder, Encoded, find_closing_tokens
from job.data.reading.rows import BadRow, Chunk, Row
from job.data.shaping.oddities import find_oddities, special_token_pattern
from job.data.shaping.shapes import Example, FatalRowError, RowError, RowFormat, to_example
from job.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGEST_BYTES = 8
_NOTHING_LEFT = "no token is left to learn from"


class Task(NamedTuple):
    """A chunk of the file with index `file`, and how its rows are read; None where it has no readable row."""

    file: int
    chunk: Chunk
    row_format: RowFormat | None


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The K rows of a chunk that can be used, T tokens in all, and those that can't. Position 0 is never predicted."""

    file: int
    size_bytes: int
    rows_read: int
    numbers: NDArray[np.int64]  # (K,) line or row in the file
    input_ids: NDArray[np.int32]  # (T,) row after row
    supervised: NDArray[np.bool_]  # (T,)
    lengths: NDArray[np.int32]  # (K,) tokens
    supervised_tokens: NDArray[np.int32]  # (K,)
    first_supervised: NDArray[np.int32]  # (K,) at least 1
    digests: NDArray[np.uint64]  # (K,) blake2b of the row's ids
    eos_rows: int
    end_token_rows: Counter[int]
    rows_with: Counter[str]
    bad_rows: list[BadRow]  # in order


class _Kept(NamedTuple):
    row: Row
    example: Example
    encoded: Encoded


class ChunkEncoder:
    """Encodes chunks with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._has_template = find_template(tokenizer) is not None
        self._closing = find_closing_tokens(tokenizer)
        self._encode_batch = BatchEncoder(tokenizer)

    def __call__(self, task: Task) -> EncodedChunk:
        """Parse, judge and tokenise a chunk. Raises DataError for a fault that every row of its kind would have."""
        bad: list[BadRow] = []
        readable: list[Row] = []
        for row in task.chunk.read():
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                readable.append(row)
        rows_read = len(bad) + len(readable)
        examples = [] if task.row_format is None else self._make_examples(readable, task.row_format, bad)
        return self._gather(task, rows_read, self._encode(examples, bad), bad)

    def _find_special_tokens(self, row_format: RowFormat | None) -> re.Pattern[str] | None:
        # Those that the user's own template writes are meant.
        template = "" if row_format is None else row_format.options.template or ""
        return special_token_pattern(token for token in self._tokenizer.all_special_tokens if token not in template)

    def _make_examples(self, rows: list[Row], row_format: RowFormat, bad: list[BadRow]) -> list[tuple[Row, Example]]:
        examples: list[tuple[Row, Example]] = []
        for row in rows:
            try:
                examples.append((row, to_example(row.values, row_format, has_template=self._has_template)))
            except FatalRowError as error:
                raise _fatal(error, row) from error
            except RowError as error:
                bad.append(_make_bad(row, error.reason))
        return examples

    def _encode(self, examples: list[tuple[Row, Example]], bad: list[BadRow]) -> list[_Kept]:
        kept: list[_Kept] = []
        results = self._encode_batch([example for _, example in examples])
        for (row, example), result in zip(examples, results, strict=True):
            if isinstance(result, FatalRowError):
                raise _fatal(result, row) from result
            if isinstance(result, RowError):
                bad.append(_make_bad(row, result.reason))
            else:
                kept.append(_Kept(row, example, result))
        return kept

    def _gather(self, task: Task, rows_read: int, kept: list[_Kept], bad: list[BadRow]) -> EncodedChunk:
        ids = [row.encoded.input_ids for row in kept]
        input_ids = np.concatenate([np.zeros(0, dtype=np.int32), *ids])
        supervised = np.concatenate([np.zeros(0, dtype=np.int32), *(row.encoded.labels for row in kept)])
        supervised = supervised != NOT_SUPERVISED
        lengths = np.array([len(row) for row in ids], dtype=np.int32)
        # All rows at once, for numpy takes as long for one row as for many.
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        learned = supervised.copy()
        learned[starts[lengths > 0]] = False  # nothing precedes a row's first token, so it is never predicted
        places = np.flatnonzero(learned)
        firsts, lasts = np.searchsorted(places, starts), np.searchsorted(places, ends)  # (K,) indices into places
        if (firsts == lasts).any():
            bad += [_make_bad(kept[index].row, _NOTHING_LEFT) for index in np.flatnonzero(firsts == lasts)]
            return self._gather(task, rows_read, [kept[index] for index in np.flatnonzero(firsts < lasts)], bad)
        special_tokens = self._find_special_tokens(task.row_format)
        notes = ({*row.example.notes, *find_oddities(row.example, special_tokens)} for row in kept)
        end_tokens = Counter(input_ids[places[lasts - 1]].tolist())
        with_eos = np.searchsorted(ends, places[input_ids[places] == self._tokenizer.eos_token_id], side="right")
        return EncodedChunk(
            file=task.file,
            size_bytes=task.chunk.size_bytes,
            rows_read=rows_read,
            numbers=np.array([row.row.number for row in kept], dtype=np.int64),
            input_ids=input_ids,
            supervised=supervised,
            lengths=lengths,
            supervised_tokens=(lasts - firsts).astype(np.int32),
            first_supervised=(places[firsts] - starts).astype(np.int32),
            digests=np.array([digest_ids(row) for row in ids], dtype=np.uint64),
            eos_rows=len(np.unique(with_eos)),
            end_token_rows=Counter({token: rows for token, rows in end_tokens.items() if token in self._closing}),
            rows_with=Counter(note for found in notes for note in found),
            bad_rows=sorted(bad, key=lambda row: row.number),
        )


def digest_ids(input_ids: NDArray[np.int32]) -> int:
    """Return 64 bits that are the same for rows of the same tokens."""
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes(), digest_size=DIGEST_BYTES).digest(), "little")


def _make_bad(row: Row, reason: str) -> BadRow:
    return BadRow(row.name, row.number, reason, row.to_json())


def _fatal(error: FatalRowError, row: Row) -> DataError:
    return DataError(f"{row.name}:{row.number}: {error.reason}", hint=error.hint)
