"""The X-ray of a data set: what is read, what is used of it, and what exactly is learned, in numbers and examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from job.data.encoding.tokens import NOT_SUPERVISED
from job.data.split import Integers, TooLong
from job.data.turn_end import TurnEnd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.data.prepare import TokenizedData

HISTOGRAM_BINS = 8
SAMPLE_ROWS = 3
SAMPLE_TOKENS = 2_000  # of each row; a book is cut


@dataclass(frozen=True)
class Piece:
    """A stretch of a decoded row that is supervised, or isn't."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens a row, over all rows that can be used."""

    p50: int
    p90: int
    p99: int
    max: int
    histogram: tuple[tuple[int, int], ...]  # (tokens up to and including, rows), ascending


@dataclass(frozen=True)
class FileRows:
    """What a file gave."""

    name: str
    format: str
    rows: int
    weight: float


@dataclass(frozen=True)
class XRay:
    """All that `check`, the log and xray.json show of the training rows; the held-out rows in so far as they differ.

    Counts are of rows unless they say tokens.
    """

    files: tuple[FileRows, ...]
    read: int
    kept: int
    skipped: dict[str, int]  # reason -> rows
    too_long: TooLong
    max_length_tokens: int
    truncation: str
    train: int  # after the split; sequences, where rows are split or weighted
    held_out: int
    held_out_in_train: int
    tokens: int  # in the sequences that are trained on
    supervised_tokens: int
    lengths: Lengths
    turn_end: TurnEnd
    duplicates: int  # rows beyond the first of their kind
    with_oddity: dict[str, int]
    samples: tuple[tuple[Piece, ...], ...]

    def counts(self) -> dict[str, int]:
        """Return the figures of the log's event `data`."""
        return {
            "rows": self.read,
            "train_rows": self.train,
            "eval_rows": self.held_out,
            "train_tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
        }


def count_lengths(lengths_tokens: NDArray[np.integer]) -> Lengths:
    """Return the percentiles and a histogram of at most eight bins of equal width."""
    p50, p90, p99 = (int(np.percentile(lengths_tokens, share, method="higher")) for share in (50, 90, 99))
    longest = int(lengths_tokens.max())
    # A few books among the rows must not squeeze all the others into one bin.
    upper = min(longest, p90 + p90 // 2)
    width = _round_up(-(-upper // HISTOGRAM_BINS))
    edges = [width * (index + 1) for index in range(-(-upper // width))]
    counts = np.histogram(lengths_tokens, bins=[0, *(edge + 1 for edge in edges)])[0].tolist()
    bins = list(zip(edges, counts, strict=True))
    if longest > edges[-1]:
        bins.append((longest, int((lengths_tokens > edges[-1]).sum())))
    return Lengths(p50, p90, p99, longest, tuple(bins))


def _round_up(width: int) -> int:
    """Return the next width that reads well: 1, 2, 4, 8, 16, 32, 64, then multiples of 64."""
    return 1 << (width - 1).bit_length() if width < 64 else -(-width // 64) * 64


def count_duplicates(digests: NDArray[np.uint64]) -> int:
    """Return how many rows repeat one that came before."""
    return len(digests) - len(np.unique(digests))


def count_overlap(held_out: NDArray[np.uint64], trained: NDArray[np.uint64]) -> int:
    """Return how many held-out rows have the very tokens of a row that is trained on, given both sets' digests."""
    return int(np.isin(held_out, trained).sum())


def decode_samples(
    data: "TokenizedData", segments: Integers, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[tuple[Piece, ...], ...]:
    """Decode the first segments, supervised and other text apart."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(data.path))).read_all()
    samples = []
    for row, start, stop in segments[:SAMPLE_ROWS].tolist():
        shown = slice(start, min(stop, start + SAMPLE_TOKENS))
        ids = table["input_ids"][row].values.to_numpy()[shown]
        supervised = table["labels"][row].values.to_numpy()[shown] != NOT_SUPERVISED
        samples.append(tuple(_decode_runs(ids, supervised, tokenizer)))
    return tuple(samples)


def _decode_runs(
    ids: NDArray[np.int32], supervised: NDArray[np.bool_], tokenizer: "PreTrainedTokenizerBase"
) -> list[Piece]:
    borders = np.flatnonzero(np.diff(supervised)) + 1
    runs: Sequence[NDArray[np.int32]] = np.split(ids, borders)
    marks = [bool(run[0]) for run in np.split(supervised, borders)]
    return [
        Piece(tokenizer.decode(run, clean_up_tokenization_spaces=False), mark)
        for run, mark in zip(runs, marks, strict=True)
    ]
