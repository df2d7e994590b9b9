"""What is known of a tokenised data set: some 20 bytes a row, so that ten million rows fit into a small memory."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from job.data.encode_chunk import EncodedChunk
from job.data.shaping.shapes import RowFormat


@dataclass(frozen=True)
class TokenizedData:
    """A tokenised data set of N rows: the Arrow file at `path`, and what is known of its rows.

    The file's columns: input_ids and labels (lists of int32, labels -100 = not supervised), file (int32, an index into
    `names`) and line (int64). A label at position 0 is never predicted, so it is counted nowhere here. The rows that
    could not be used are in no count but `rows_read` and `bad_rows`.
    """

    path: Path
    names: tuple[str, ...]
    rows_per_file: tuple[int, ...]
    formats: tuple[RowFormat | None, ...]  # None for a file without a readable row
    lengths_tokens: NDArray[np.int32]  # (N,)
    supervised_tokens: NDArray[np.int32]  # (N,)
    first_supervised: NDArray[np.int32]  # (N,) index of the first supervised token, at least 1
    digests: NDArray[np.uint64]  # (N,) the same for rows of the same input_ids
    eos_supervised_rows: int  # rows in which EOS is learned
    end_token_rows: dict[int, int]  # rows by the special or added token that their supervised text ends with
    rows_with: dict[str, int]  # rows by what is odd in them
    rows_read: int  # good and bad
    bad_rows: int
    bad_reasons: dict[str, int]  # bad rows by reason, in which numbers are N
    shown_bad_rows: tuple[str, ...]  # the first as `file:line: reason`
    bad_rows_path: Path  # JSONL of all of them: file, line, reason, row


@dataclass
class Statistics:
    """The same while rows are still being added."""

    # Arrays grow in place, where joining pieces at the end would need the memory twice. Quoted: array takes no type
    # arguments at run time before Python 3.12.
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    supervised: "array[int]" = field(default_factory=lambda: array("i"))
    first: "array[int]" = field(default_factory=lambda: array("i"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    rows_per_file: Counter[int] = field(default_factory=Counter)
    eos_rows: int = 0
    end_token_rows: Counter[int] = field(default_factory=Counter)
    rows_with: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    read_bytes: int = 0

    def add(self, chunk: EncodedChunk) -> None:
        """Count the rows of a chunk."""
        self.lengths.frombytes(chunk.lengths.tobytes())
        self.supervised.frombytes(chunk.supervised_tokens.tobytes())
        self.first.frombytes(chunk.first_supervised.tobytes())
        self.digests.frombytes(chunk.digests.tobytes())
        self.rows_per_file[chunk.file] += len(chunk.lengths)
        self.eos_rows += chunk.eos_rows
        self.end_token_rows += chunk.end_token_rows
        self.rows_with += chunk.rows_with
        self.rows_read += chunk.rows_read
        self.read_bytes += chunk.size_bytes
