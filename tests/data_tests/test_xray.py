"""The numbers of the X-ray, and that its examples show what is supervised."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from job.data import load_tokenizer
from job.data.xray import Piece, count_duplicates, count_lengths, count_overlap, decode_samples


def test_lengths() -> None:
    lengths = count_lengths(np.arange(1, 101))
    assert (lengths.p50, lengths.p90, lengths.p99, lengths.max) == (51, 91, 100, 100)
    assert lengths.histogram[0] == (16, 16)
    assert sum(rows for _, rows in lengths.histogram) == 100
    assert lengths.histogram[-1][0] >= 100


def test_one_book_does_not_squeeze_the_other_rows_into_one_bin() -> None:
    lengths = count_lengths(np.array([*range(50, 150), 100_000]))
    assert lengths.max == 100_000
    assert lengths.histogram[-1] == (100_000, 1)
    assert len([rows for _, rows in lengths.histogram if rows]) > 3


def test_rows_of_one_length() -> None:
    assert count_lengths(np.array([7])).histogram == ((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 1))


def test_copies() -> None:
    digests = np.array([3, 3, 4, 3], np.uint64)
    assert count_duplicates(digests) == 2
    assert count_overlap(np.array([4, 9], np.uint64), digests) == 1


@dataclass
class Tokens:
    path: Path


def test_samples_show_what_is_supervised(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("<|im_start|>user\n2 + 2 ", "= 四 🙂<|im_end|>"))
    ids = prompt + answer
    labels = [-100] * len(prompt) + answer
    table = pa.table(
        {name: pa.array([[], row], pa.list_(pa.int32())) for name, row in (("input_ids", ids), ("labels", labels))}
    )
    with pa.OSFile(str(tmp_path / "t"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    whole, cut = decode_samples(
        Tokens(tmp_path / "t"),  # type: ignore[arg-type]
        np.array([[1, 0, len(ids)], [1, len(prompt), len(ids)]]),
        tokenizer,
    )
    assert whole == (Piece("<|im_start|>user\n2 + 2 ", False), Piece("= 四 🙂<|im_end|>", True))
    assert cut == (Piece("= 四 🙂<|im_end|>", True),)
