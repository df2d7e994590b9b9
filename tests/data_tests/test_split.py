"""Which rows are used, which part of them, and how often."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.split import TooLong, choose_max_length, count_copies, find_duplicates, select_rows, split_rows


@dataclass
class Tokens:
    """What `select_rows` reads of tokenised data."""

    path: Path
    lengths_tokens: np.ndarray
    supervised_tokens: np.ndarray


def tokens(folder: Path, rows: list[str]) -> Tokens:
    """Rows written as `...xx`: a dot is a token of a prompt, an x a supervised one."""
    labels = [[7 if mark == "x" else -100 for mark in row] for row in rows]
    table = pa.table({"labels": pa.array(labels, type=pa.list_(pa.int32()))})
    with pa.OSFile(str(folder / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    supervised = [row[1:].count("x") for row in rows]
    return Tokens(folder / "t.arrow", np.array([len(row) for row in rows], np.int32), np.array(supervised, np.int32))


def test_drop_leaves_long_rows_out_and_counts_what_is_lost(tmp_path: Path) -> None:
    found = select_rows(tokens(tmp_path, ["..xx", "...xxxxx", ".x"]), max_length=4, truncation="drop")
    assert found.segments.tolist() == [[0, 0, 4], [2, 0, 2]]
    assert found.supervised_tokens.tolist() == [2, 1]
    assert found.too_long == TooLong(rows=1, left_out=1, lost_tokens=8, lost_supervised_tokens=5)


def test_keep_start_never_keeps_a_row_without_supervision(tmp_path: Path) -> None:
    found = select_rows(tokens(tmp_path, ["....xx", "..xxxx", ".x"]), max_length=4, truncation="keep_start")
    assert found.segments.tolist() == [[1, 0, 4], [2, 0, 2]]
    assert found.supervised_tokens.tolist() == [2, 1]
    assert found.too_long == TooLong(
        rows=2, left_out_unsupervised=1, cut=1, lost_tokens=6 + 2, lost_supervised_tokens=2 + 2
    )


def test_split_predicts_every_token_once_and_leaves_out_pieces_without_supervision(tmp_path: Path) -> None:
    found = select_rows(tokens(tmp_path, ["......xxxx", ".x"]), max_length=4, truncation="split")
    # [0, 4) holds nothing supervised
    assert found.segments.tolist() == [[0, 3, 7], [0, 6, 10], [1, 0, 2]]
    assert found.supervised_tokens.tolist() == [1, 3, 1]
    assert found.too_long == TooLong(rows=1, split=1, lost_tokens=3, lost_supervised_tokens=0)


@given(
    rows=st.lists(st.text("x.", min_size=1, max_size=30).map(lambda row: row + "x"), min_size=1, max_size=8),
    max_length=st.integers(2, 12),
)
@settings(max_examples=60, deadline=None)
def test_splitting_loses_no_supervised_token(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], max_length: int
) -> None:
    data = tokens(tmp_path_factory.mktemp("split"), rows)
    found = select_rows(data, max_length=max_length, truncation="split")  # type: ignore[arg-type]
    assert found.supervised_tokens.sum() == data.supervised_tokens.sum()
    assert found.too_long.lost_supervised_tokens == found.too_long.left_out_unsupervised == 0
    lengths = found.segments[:, 2] - found.segments[:, 1]
    assert lengths.max() <= max_length
    assert (np.diff(found.segments[:, 0]) >= 0).all()


def test_max_length_is_rounded_up_within_the_context() -> None:
    lengths = np.array([10] * 198 + [130, 500])
    assert choose_max_length(lengths, 4096) == 192
    assert choose_max_length(lengths, 100) == 100


@pytest.mark.parametrize(
    ("count", "fraction", "eval_rows"),
    [(49, None, 0), (50, None, 5), (10_000, None, 500), (10, 0.25, 2), (3, 0.1, 1), (1, 0.5, 0), (10, 0.0, 0)],
)
def test_split_rows(count: int, fraction: float | None, eval_rows: int) -> None:
    rows = np.arange(count) * 3
    train, held_out = split_rows(rows, repeated=np.zeros(count, bool), fraction=fraction, seed=1)
    assert len(held_out) == eval_rows
    assert sorted([*train, *held_out]) == rows.tolist()
    assert (np.diff(train) > 0).all()


def test_a_row_that_occurs_twice_is_not_held_out() -> None:
    repeated = find_duplicates(np.array([5, 6, 5, 7, 6, 8], np.uint64))
    assert repeated.tolist() == [True, True, True, False, True, False]
    _, held_out = split_rows(np.arange(6), repeated=repeated, fraction=0.5, seed=0)
    assert held_out.tolist() == [3, 5]


def test_split_rows_follows_the_seed() -> None:
    first, same, other = (
        split_rows(np.arange(100), repeated=np.zeros(100, bool), fraction=0.1, seed=seed)[1].tolist()
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_weights_repeat_and_thin_out_whole_rows() -> None:
    segments = np.array([[row, piece * 4, piece * 4 + 4] for row in range(40) for piece in range(2)])
    weights = np.where(segments[:, 0] < 20, 2.0, 0.25)
    copies = count_copies(segments, weights, seed=3).reshape(40, 2)
    assert (copies[:, 0] == copies[:, 1]).all()  # the pieces of a row stay together
    assert copies[:20].tolist() == [[2, 2]] * 20
    assert copies[20:, 0].sum() == 5
    assert (count_copies(segments, weights, seed=3).reshape(40, 2) == copies).all()
    assert (count_copies(segments, weights, seed=4).reshape(40, 2) != copies).any()


def test_a_tiny_weight_keeps_a_row_and_a_broken_one_adds_some() -> None:
    segments = np.array([[row, 0, 4] for row in range(10)])
    assert count_copies(segments, np.full(10, 0.01), seed=3).sum() == 1
    assert sorted(count_copies(segments, np.full(10, 1.5), seed=3)) == [1] * 5 + [2] * 5
    assert count_copies(segments, np.ones(10), seed=3).tolist() == [1] * 10
