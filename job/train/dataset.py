"""Rows of token ids for training: memory-mapped, in an order that depends on seed and batch size alone, and joined
into micro batches with or without padding."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch.utils.data import Dataset, Sampler

IGNORED = -100  # label of a token that isn't supervised


class Row(TypedDict):
    """One sequence of T tokens."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, -100 = not supervised


Collate = Callable[[list[Row]], dict[str, torch.Tensor]]


class TokenRows(Dataset[Row]):
    """Chosen rows of a token file, cut to the maximum length; the file is memory-mapped, not read."""

    def __init__(self, tokens: Path, rows: np.ndarray, max_length_tokens: int) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(tokens))).read_all()
        self._input_ids = table["input_ids"]
        self._labels = table["labels"]
        self._rows = rows  # (N,) int64
        self._max_length_tokens = max_length_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = int(self._rows[index])
        return {"input_ids": self._read(self._input_ids, row), "labels": self._read(self._labels, row)}

    def lengths(self) -> np.ndarray:
        """Return each row's tokens after the cut, int64 (N,)."""
        lengths = pa.compute.list_value_length(self._input_ids).to_numpy()[self._rows].astype(np.int64)
        shortened: np.ndarray = np.minimum(lengths, self._max_length_tokens)
        return shortened

    def _read(self, column: pa.ChunkedArray, row: int) -> torch.Tensor:
        values = column[row].values.to_numpy()[: self._max_length_tokens]
        return torch.from_numpy(values.astype(np.int64))


class StreamSampler(Sampler[int]):
    """Row indices for a whole run: one shuffled pass after the other, cut at `steps` x `global_batch_size`.

    Step s learns from positions s * global_batch_size onwards, however many processes share them; the last step is
    filled from the next pass.
    """

    def __init__(self, rows: int, *, steps: int, global_batch_size: int, seed: int) -> None:
        self._rows = rows
        self._length = steps * global_batch_size
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for position in range(0, self._length, self._rows):
            generator = np.random.default_rng([self._seed, position // self._rows])
            order = generator.permutation(self._rows)
            yield from order[: self._length - position].tolist()


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
