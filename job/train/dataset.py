"""Rows of token ids for training: memory-mapped, in an order that depends on seed and batch size alone, and joined
into micro batches with or without padding."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch.utils.data import Dataset, Sampler

from job.errors import InternalError
from job.stream import iterate_stream

IGNORED = -100  # label of a token that isn't supervised
_SHOWN_PLACES = 20


class Row(TypedDict):
    """One sequence of T tokens."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, -100 = not supervised


Collate = Callable[[list[Row]], dict[str, Any]]


class TokenRows(Dataset[Row]):
    """Chosen segments of the rows in a token file, which is memory-mapped, not read.

    `segments` is int64 (N, 3): row, first token, end of its tokens (exclusive). A long row may be cut, or lie in
    several segments. Raises InternalError for a segment that isn't within its row.
    """

    def __init__(self, tokens: Path, segments: np.ndarray) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(tokens))).read_all()
        self._table = table
        self._input_ids = table["input_ids"]
        self._labels = table["labels"]
        self._segments = segments  # (N, 3) int64
        self._check_segments()

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, index: int) -> Row:
        row, start, stop = self._segments[index].tolist()
        return {
            "input_ids": _read(self._input_ids, row, start, stop),
            "labels": _read(self._labels, row, start, stop),
        }

    def lengths(self) -> np.ndarray:
        """Return each segment's tokens, int64 (N,)."""
        lengths: np.ndarray = self._segments[:, 2] - self._segments[:, 1]
        return lengths

    def sources(self, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return the rows that the segments are of, int64 (R,) ascending, and where these stand, given the names of the
        data files: `a.jsonl:3`, without the folders where the files' own names tell them apart."""
        rows = np.unique(self._segments[:, 0])
        short = [name.rsplit("/", 1)[-1] for name in names]
        shown = short if len(set(short)) == len(names) else names
        files, lines = (self._table[column].take(pa.array(rows)).to_pylist() for column in ("file", "line"))
        return rows, [f"{shown[file]}:{line}" for file, line in zip(files, lines, strict=True)]

    def add_up(self, values: np.ndarray) -> np.ndarray:
        """Return the sums (R, ...) of the segments' values (N, ...) over each of the rows of `sources`."""
        rows, places = np.unique(self._segments[:, 0], return_inverse=True)
        sums = np.zeros((len(rows), *values.shape[1:]), dtype=values.dtype)
        np.add.at(sums, places, values)
        return sums

    def describe(self, indices: np.ndarray, names: Sequence[str]) -> str:
        """Return where segments come from, given the names of the data files: `a.jsonl:3, 17; b.jsonl:1`."""
        rows = np.unique(self._segments[indices, 0])
        lines: dict[str, list[str]] = {}
        for row in rows[:_SHOWN_PLACES].tolist():
            name = names[self._table["file"][row].as_py()]
            lines.setdefault(name, []).append(str(self._table["line"][row]))
        described = "; ".join(f"{name}:{', '.join(numbers)}" for name, numbers in lines.items())
        more = len(rows) - _SHOWN_PLACES
        return f"{described} and {more:,} more" if more > 0 else described

    def _check_segments(self) -> None:
        # numpy would cut a slice that reaches beyond the row without a word, and the counts would be wrong
        rows, starts, stops = self._segments.T
        lengths = pa.compute.list_value_length(self._input_ids).to_numpy()[rows]  # (N,)
        outside = np.flatnonzero((starts < 0) | (starts >= stops) | (stops > lengths))
        if len(outside):
            row, start, stop = self._segments[outside[0]].tolist()
            raise InternalError(f"tokens {start} to {stop} are not within row {row} of {lengths[outside[0]]} tokens")


def _read(column: pa.ChunkedArray, row: int, start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(column[row].values.to_numpy()[start:stop].astype(np.int64))


class StreamSampler(Sampler[int]):
    """Row indices for a whole run of `steps` x `global_batch_size`, step by step in the order of `iterate_stream`.

    A run that goes on begins after `start_step` steps, where another has stopped. `deal`, given the indices of a step's
    rows (G,), returns them in the order in which they are dealt out to the processes.
    """

    def __init__(
        self,
        rows: int,
        *,
        steps: int,
        global_batch_size: int,
        seed: int,
        start_step: int = 0,
        deal: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._rows = rows
        self._global_batch_size = global_batch_size
        self._start = start_step * global_batch_size
        self._stop = steps * global_batch_size
        self._seed = seed
        self._deal = deal

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[int]:
        size, rest = self._global_batch_size, np.empty(0, dtype=np.int64)
        for order in iterate_stream(self._rows, self._start, self._stop, seed=self._seed):
            known = np.concatenate([rest, order])
            whole = len(known) // size * size
            for step in known[:whole].reshape(-1, size):
                yield from (step if self._deal is None else self._deal(step)).tolist()
            rest = known[whole:]


def _labels_of(row: Row) -> torch.Tensor:
    # Nothing precedes the first token, so it is never predicted. In a joined sequence the previous document's last
    # token would predict it; and the token count that the loss is divided by must not include it.
    labels = row["labels"].clone()
    labels[0] = IGNORED
    return labels


def join_rows(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Join rows into one sequence of T tokens in all, without padding: positions start anew with every row, by which
    attention keeps them apart."""
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],  # (1, T)
        "labels": torch.cat([_labels_of(row) for row in rows])[None],  # (1, T)
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],  # (1, T)
    }


def move_batch(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return a batch with its tensors on a device; what else is in it stays."""
    return {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}


class PadRows:
    """Joins rows into a batch of B rows padded to the longest, T tokens."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels and attention_mask, each (B, T) int64. Padding is masked by position, not by its
        token id, so that an end-of-sequence token that doubles as padding is still learned."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._pad_token_id),
            "labels": pad([_labels_of(row) for row in rows], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
        }
