"""The order of rows, and how rows become micro batches."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from job.data import Encoders, RowOptions, SourceFile, load_tokenizer, tokenize_files
from job.errors import InternalError
from job.train.dataset import IGNORED, PadRows, Row, StreamSampler, TokenRows, join_rows

EOS = 2


def make_row(*ids: int) -> Row:
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def write_tokens(path: Path, rows: list[list[int]], places: list[tuple[int, int]] | None = None) -> Path:
    """Write rows of tokens, all supervised but the first, from the places (file, line) given, or line after line."""
    tokens = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", tokens), ("labels", tokens), ("file", pa.int32()), ("line", pa.int64())])
    places = places or [(0, index + 1) for index in range(len(rows))]
    with pa.ipc.new_file(str(path), schema) as writer:
        for row, (file, line) in zip(rows, places, strict=True):  # a batch each: rows must be found across batches
            values = {"input_ids": [row], "labels": [[IGNORED, *row[1:]]], "file": [file], "line": [line]}
            writer.write_batch(pa.record_batch(values, schema=schema))
    return path


def test_every_pass_has_every_row_once_in_an_order_of_its_own() -> None:
    order = list(StreamSampler(10, steps=5, global_batch_size=8, seed=1))
    assert len(order) == 40
    passes = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 4


def test_the_last_step_is_filled_from_the_next_pass() -> None:
    order = list(StreamSampler(10, steps=3, global_batch_size=8, seed=1))
    assert len(order) == 24
    assert order == list(StreamSampler(10, steps=5, global_batch_size=8, seed=1))[:24]
    assert len(list(StreamSampler(3, steps=1, global_batch_size=8, seed=1))) == 8  # fewer rows than one step


def test_a_run_that_goes_on_reads_what_the_other_would_have_read_next() -> None:
    for rows in (3, 10, 41):  # fewer than one step's, a step from pass to pass, more than all
        order = list(StreamSampler(rows, steps=5, global_batch_size=8, seed=1))
        for done in range(5):
            rest = StreamSampler(rows, steps=5, global_batch_size=8, seed=1, start_step=done)
            assert list(rest) == order[done * 8 :]
            assert len(rest) == 40 - done * 8


def test_the_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[int]:
        return list(StreamSampler(50, steps=10, global_batch_size=5, seed=seed))

    sampler = StreamSampler(50, steps=10, global_batch_size=5, seed=7)
    assert list(sampler) == list(sampler) == order(7)
    assert order(7) != order(8)
    assert len(sampler) == 50


@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (1, 12), (1, 4), (2, 3), (3, 2), (4, 3), (6, 1)])
def test_each_step_learns_from_the_same_rows_however_many_processes(processes: int, micro: int) -> None:
    global_batch, steps = 12, 7
    accumulation = global_batch // (processes * micro)
    sampler = StreamSampler(20, steps=steps, global_batch_size=global_batch, seed=3)
    dealt = [
        list(BatchSamplerShard(BatchSampler(sampler, micro, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert [len(batches) for batches in dealt] == [steps * accumulation] * processes
    order = list(sampler)
    for step in range(steps):
        seen = Counter(
            row
            for batches in dealt
            for batch in batches[step * accumulation : (step + 1) * accumulation]
            for row in batch
        )
        assert seen == Counter(order[step * global_batch : (step + 1) * global_batch])


def test_joined_rows_count_their_positions_anew() -> None:
    batch = join_rows([make_row(5, 6, EOS), make_row(7, EOS)])
    assert batch["input_ids"].tolist() == [[5, 6, EOS, 7, EOS]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # The first token of a row would be predicted from the row before it.
    assert batch["labels"].tolist() == [[IGNORED, 6, EOS, IGNORED, EOS]]
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert "attention_mask" not in batch  # with one, transformers would not look at the positions


def test_padding_is_masked_and_an_end_token_that_doubles_as_padding_is_learned() -> None:
    batch = PadRows(EOS)([make_row(5, 6, EOS), make_row(7, EOS)])
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [7, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, EOS], [IGNORED, EOS, IGNORED]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize("collate", [join_rows, PadRows(0)])
def test_joining_leaves_the_rows_as_they_are(collate: Any) -> None:
    row = make_row(5, 6)
    collate([row, row])
    assert row["labels"].tolist() == [5, 6]


def test_segments_of_rows_are_read_and_nothing_else(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.arrow", [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]])
    rows = TokenRows(path, np.array([[2, 0, 4], [0, 0, 3], [2, 3, 5], [3, 0, 1]]))
    assert len(rows) == 4
    assert rows[0]["input_ids"].tolist() == [6, 7, 8, 9]
    assert rows[0]["labels"].tolist() == [IGNORED, 7, 8, 9]
    assert rows[1]["input_ids"].tolist() == [1, 2, 3]
    assert rows[2]["input_ids"].tolist() == rows[2]["labels"].tolist() == [9, 10]
    assert rows[-1]["input_ids"].tolist() == [11]
    assert rows.lengths().tolist() == [4, 3, 2, 1]
    assert rows[0]["input_ids"].dtype == rows[0]["labels"].dtype == torch.int64
    rows[0]["input_ids"][0] = 99  # the file is mapped read-only: what comes out of it must be a copy
    assert rows[0]["input_ids"][0] == 6


def test_segments_are_named_by_file_and_line(tmp_path: Path) -> None:
    places = [*((0, line) for line in range(11, 39)), (1, 1), (1, 2)]
    path = write_tokens(tmp_path / "tokens.arrow", [[1, 2]] * 30, places)
    rows = TokenRows(path, np.array([[row, 0, 2] for row in (29, 3, 0, 28)] + [[row, 0, 1] for row in range(30)]))
    names = ["a.jsonl", "s3://b/b.csv"]
    # Two of the segments are of row 0.
    assert rows.describe(np.array([0, 1, 2, 3, 4]), names) == "a.jsonl:11, 14; s3://b/b.csv:1, 2"
    assert rows.describe(np.arange(34), names) == f"a.jsonl:{', '.join(map(str, range(11, 31)))} and 10 more"


def test_the_first_token_of_a_segment_is_not_learned(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.arrow", [[6, 7, 8, 9, 10]])
    rows = TokenRows(path, np.array([[0, 0, 3], [0, 3, 5]]))
    for batch in (join_rows([rows[0], rows[1]]), PadRows(0)([rows[0], rows[1]])):
        learned = batch["labels"][batch["labels"] != IGNORED]
        assert learned.tolist() == [7, 8, 10]  # 9 has nothing before it


@pytest.mark.parametrize("segment", [[1, 0, 3], [1, -1, 2], [1, 1, 1], [1, 2, 1]])
def test_a_segment_beyond_its_row_is_a_bug(tmp_path: Path, segment: list[int]) -> None:
    path = write_tokens(tmp_path / "tokens.arrow", [[1, 2, 3], [4, 5]])
    with pytest.raises(InternalError, match=f"tokens {segment[1]} to {segment[2]} are not within row 1 of 2 tokens"):
        TokenRows(path, np.array([[0, 0, 3], segment]))


def test_no_segments_are_no_rows(tmp_path: Path) -> None:
    rows = TokenRows(write_tokens(tmp_path / "tokens.arrow", [[1, 2]]), np.zeros((0, 3), np.int64))
    assert len(rows) == 0
    assert rows.lengths().tolist() == []


def test_rows_that_the_parent_tokenised(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": "two and", "completion": f" {n}"}) + "\n" for n in range(5)))
    data = tokenize_files(
        [SourceFile(source, "rows.jsonl", "sha256")],
        tokenizer,
        RowOptions(),
        folder=tmp_path / "tokens",
        encoders=Encoders(1),
        report=lambda rows, size_bytes: None,
    )
    rows = TokenRows(data.path, np.column_stack([np.arange(5), np.zeros(5, np.int64), data.lengths_tokens]))
    assert rows.lengths().tolist() == data.lengths_tokens.tolist()
    for index in range(5):
        labels = rows[index]["labels"]
        assert len(labels) == len(rows[index]["input_ids"]) == data.lengths_tokens[index]
        assert int((labels[1:] != IGNORED).sum()) == data.supervised_tokens[index]
        assert str(index) in tokenizer.decode(labels[labels != IGNORED])
