"""Which rows are trained on, which part of them, and how often: arithmetic over token counts.

A segment is a row's tokens from start to stop, half-open: the whole row as a rule, less of it where the row is longer
than the maximum length. Segments are int64 arrays (K, 3) of row, start and stop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from job.data.encoding.tokens import NOT_SUPERVISED
from job.errors import DataError

if TYPE_CHECKING:
    from job.data.prepare import TokenizedData

Truncation = Literal["drop", "split", "keep_start"]
Integers = NDArray[np.int64]
ReadLabels = Callable[[int], NDArray[np.int32]]  # row -> its labels (T,)

LENGTH_STEP_TOKENS = 64
AUTO_EVAL_MIN_ROWS = 50
AUTO_EVAL_MAX_ROWS = 500


@dataclass(frozen=True)
class TooLong:
    """What became of the rows that are longer than the maximum, and what is lost with them."""

    rows: int = 0
    left_out: int = 0
    left_out_unsupervised: int = 0  # rows of which nothing that is supervised fits
    cut: int = 0  # rows of which the start is kept
    split: int = 0  # rows that became several segments
    lost_tokens: int = 0
    lost_supervised_tokens: int = 0


@dataclass(frozen=True)
class Selection:
    """The segments to use."""

    segments: Integers  # (K, 3), rows ascending
    supervised_tokens: Integers  # (K,)
    too_long: TooLong


def choose_max_length(lengths_tokens: NDArray[np.integer], context_tokens: int) -> int:
    """Return the length that holds 99 % of the rows, rounded up to a multiple of 64, within the model's context."""
    if len(lengths_tokens) == 0:
        raise DataError("there are no rows to choose a maximum length from")
    most = int(np.percentile(lengths_tokens, 99, method="higher"))
    rounded = -(-most // LENGTH_STEP_TOKENS) * LENGTH_STEP_TOKENS
    return min(rounded, context_tokens)


def read_labels(data: "TokenizedData") -> ReadLabels:
    """Return a function that reads one row's labels from the memory-mapped token file."""
    import pyarrow as pa

    labels = pa.ipc.open_file(pa.memory_map(str(data.path))).read_all()["labels"]

    def read(row: int) -> NDArray[np.int32]:
        values: NDArray[np.int32] = labels[row].values.to_numpy()
        return values

    return read


def select_rows(data: "TokenizedData", *, max_length: int, truncation: Truncation) -> Selection:
    """Choose what to use of each row when a sequence may have at most `max_length` tokens.

    `drop` leaves longer rows out; `keep_start` keeps their first `max_length` tokens; `split` makes sequences of at
    most `max_length` tokens of them, each beginning with the last token of the one before, so that every token but the
    row's first is predicted once. A segment without a supervised token is never used.
    """
    lengths = data.lengths_tokens.astype(np.int64)
    rows = np.arange(len(lengths), dtype=np.int64)
    fits = lengths <= max_length
    whole = _segments(rows[fits], 0, lengths[fits])
    whole_supervised = data.supervised_tokens[fits].astype(np.int64)
    long_rows = rows[~fits]
    if truncation == "drop" or len(long_rows) == 0:
        too_long = TooLong(
            rows=len(long_rows),
            left_out=len(long_rows),
            lost_tokens=int(lengths[~fits].sum()),
            lost_supervised_tokens=int(data.supervised_tokens[~fits].sum()),
        )
        return Selection(whole, whole_supervised, too_long)
    labels_of = read_labels(data)
    pieces: list[tuple[int, int, int]] = []
    supervised: list[int] = []
    unusable = 0
    for row in long_rows.tolist():
        stops = _stops(int(lengths[row]), max_length) if truncation == "split" else [(0, max_length)]
        found = _count_supervised(labels_of(row), stops)
        pieces += [(row, start, stop) for (start, stop), count in zip(stops, found, strict=True) if count]
        supervised += [count for count in found if count]
        unusable += not any(found)
    segments = np.concatenate([whole, np.array(pieces, dtype=np.int64).reshape(-1, 3)])
    counts = np.concatenate([whole_supervised, np.array(supervised, dtype=np.int64)])
    order = np.argsort(segments[:, 0], kind="stable")
    segments, counts = segments[order], counts[order]
    used_long = len(long_rows) - unusable
    too_long = TooLong(
        rows=len(long_rows),
        left_out_unsupervised=unusable,
        cut=used_long if truncation == "keep_start" else 0,
        split=used_long if truncation == "split" else 0,
        lost_tokens=int(lengths.sum() - _count_tokens(segments)),
        lost_supervised_tokens=int(data.supervised_tokens.sum() - counts.sum()),
    )
    return Selection(segments, counts, too_long)


def _segments(rows: Integers, start: int, stops: Integers) -> Integers:
    segments: Integers = np.stack([rows, np.full(len(rows), start, dtype=np.int64), stops], axis=1)
    return segments


def _stops(length: int, max_length: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of a long row's pieces, each overlapping the one before by one token."""
    return [(start, min(start + max_length, length)) for start in range(0, length - 1, max_length - 1)]


def _count_supervised(labels: NDArray[np.int32], ranges: list[tuple[int, int]]) -> list[int]:
    # Nothing precedes a segment's first token, so that one is never predicted.
    return [int((labels[start + 1 : stop] != NOT_SUPERVISED).sum()) for start, stop in ranges]


def _count_tokens(segments: Integers) -> int:
    """Return the tokens in ascending segments, each overlap of one token counted once."""
    before, after = segments[:-1], segments[1:]
    overlaps = (before[:, 0] == after[:, 0]) & (after[:, 1] < before[:, 2])
    return int((segments[:, 2] - segments[:, 1]).sum() - overlaps.sum())


def find_duplicates(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say for each row (N,) whether another one has the same tokens."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    repeated: NDArray[np.bool_] = counts[inverse] > 1
    return repeated


def split_rows(
    rows: Integers, *, repeated: NDArray[np.bool_], fraction: float | None, seed: int
) -> tuple[Integers, Integers]:
    """Split distinct rows into (training, evaluation), disjoint, both ascending, the same for the same seed.

    `fraction` None: a tenth, at most 500 rows, and none where there are fewer than 50. A fraction above 0 gives at
    least one evaluation row and leaves at least one to train on. A row that occurs more than once (`repeated`, (K,))
    is never held out, for a copy of it would be learned.
    """
    count = len(rows)
    if fraction is None:
        eval_rows = min(count // 10, AUTO_EVAL_MAX_ROWS) if count >= AUTO_EVAL_MIN_ROWS else 0
    elif fraction > 0:
        eval_rows = min(max(round(count * fraction), 1), max(count - 1, 0))
    else:
        eval_rows = 0
    candidates = np.random.default_rng(seed).permutation(rows[~repeated])
    held_out = np.sort(candidates[:eval_rows])
    return np.setdiff1d(rows, held_out, assume_unique=True), held_out


def count_copies(segments: Integers, weights: NDArray[np.float64], *, seed: int) -> Integers:
    """Return how often each segment is used in one pass (K,), as its row's weight says: 2 is twice, 0.5 is half of such
    rows, drawn by the seed.

    `weights` has one entry for each segment; the segments of one weight are drawn from together, and at least one of
    their rows is used.
    """
    copies = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights):
        rows = np.unique(segments[weights == weight, 0])
        extra = round(len(rows) * (weight - np.floor(weight)))
        chosen = np.random.default_rng(seed).permutation(rows)[: extra if weight >= 1 else max(1, extra)]
        copies += (weights == weight) & np.isin(segments[:, 0], chosen)
    return copies
