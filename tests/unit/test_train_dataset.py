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

from job.data import load_tokenizer, tokenize_files
from job.train.dataset import IGNORED, PadRows, Row, StreamSampler, TokenRows, join_rows

EOS = 2


def make_row(*ids: int) -> Row:
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def write_tokens(path: Path, rows: list[list[int]]) -> Path:
    tokens = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", tokens), ("labels", tokens)])
    with pa.ipc.new_file(str(path), schema) as writer:
        for row in rows:  # a batch each: the worker must find rows across batches
            labels = [IGNORED, *row[1:]]
            writer.write_batch(pa.record_batch([pa.array([row], tokens), pa.array([labels], tokens)], schema=schema))
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


def test_rows_are_chosen_and_cut(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.arrow", [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]])
    rows = TokenRows(path, np.array([2, 0, 3]), max_length_tokens=4)
    assert len(rows) == 3
    assert rows[0]["input_ids"].tolist() == [6, 7, 8, 9]
    assert rows[0]["labels"].tolist() == [IGNORED, 7, 8, 9]
    assert rows[1]["input_ids"].tolist() == [1, 2, 3]
    assert rows[-1]["input_ids"].tolist() == [11]
    assert rows.lengths().tolist() == [4, 3, 1]
    assert rows[0]["input_ids"].dtype == rows[0]["labels"].dtype == torch.int64
    rows[0]["input_ids"][0] = 99  # the file is mapped read-only: what comes out of it must be a copy
    assert rows[0]["input_ids"][0] == 6


def test_rows_that_the_parent_tokenised(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": "two and", "completion": f" {n}"}) + "\n" for n in range(5)))
    data = tokenize_files(
        [(source, "rows.jsonl")], tokenizer, loss_on="auto", target=tmp_path / "t.arrow", report=lambda _: None
    )
    rows = TokenRows(data.path, np.arange(5), max_length_tokens=512)
    assert rows.lengths().tolist() == data.lengths_tokens.tolist()
    for index in range(5):
        labels = rows[index]["labels"]
        assert len(labels) == len(rows[index]["input_ids"]) == data.lengths_tokens[index]
        assert int((labels[1:] != IGNORED).sum()) == data.supervised_tokens[index]
        assert str(index) in tokenizer.decode(labels[labels != IGNORED])
