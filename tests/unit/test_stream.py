"""Which rows of a step come together, and how many tokens the largest micro batch of a run has, before it begins."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from job import stream
from job.stream import deal_rows, micro_batch_counter
from job.train.dataset import StreamSampler

ROWS, STEPS, BATCH, SEED = 37, 11, 12, 5
PLAN: dict[str, Any] = {
    "packing": True,
    "max_length_tokens": 99,
    "steps": STEPS,
    "global_batch_size": BATCH,
    "seed": SEED,
    "nodes": 1,
    "processes": 1,
}


def make_steps(steps: int, rows: int) -> np.ndarray:
    """Return tokens (S, G) of rows as real ones are: many short ones, and a few long."""
    tokens: np.ndarray = np.random.default_rng(0).lognormal(5.7, 0.9, (steps, rows)).clip(1, 4096).astype(np.int64)
    return tokens


def deal_out(tokens: np.ndarray, size: int, *, processes: int, is_joined: bool = True) -> np.ndarray:
    """Return the tokens as they are dealt out, (S, turns, processes, size), each row once."""
    order = deal_rows(tokens, size, processes=processes, is_joined=is_joined)
    assert np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    return np.take_along_axis(tokens, order, axis=1).reshape(len(tokens), -1, processes, size)


@pytest.mark.parametrize(("processes", "size", "turns"), [(8, 4, 4), (8, 1, 8), (64, 8, 2), (2, 2, 16)])
def test_no_process_has_many_more_tokens_than_the_others(processes: int, size: int, turns: int) -> None:
    tokens = make_steps(50, processes * size * turns)
    by_process = deal_out(tokens, size, processes=processes).sum(axis=(1, 3))  # (S, P)
    as_they_come = tokens.reshape(50, turns, processes, size).sum(axis=(1, 3))
    assert (by_process.max(axis=1) / by_process.mean(axis=1)).mean() < 1.08
    assert (as_they_come.max(axis=1) / as_they_come.mean(axis=1)).mean() > 1.1
    in_each_turn = deal_out(tokens, size, processes=processes).sum(axis=3)
    assert (np.diff(in_each_turn, axis=1) <= 0).all()  # the large ones at a time


def test_the_largest_micro_batch_is_hardly_more_than_a_row_or_the_mean() -> None:
    tokens = make_steps(50, 32)
    sums = deal_out(tokens, 4, processes=1).sum(axis=3)  # (S, turns, 1)
    least = np.maximum(tokens.max(axis=1), tokens.sum(axis=1) / 8)
    assert (sums.max(axis=(1, 2)) / least).mean() < 1.1
    assert sums.max() < 0.7 * tokens.reshape(50, 8, 4).sum(axis=2).max()


def test_padded_rows_lie_beside_those_of_their_length() -> None:
    tokens = make_steps(50, 32)
    padded = 4 * deal_out(tokens, 4, processes=1, is_joined=False).max(axis=3).sum()
    assert padded < 0.7 * 4 * tokens.reshape(50, 8, 4).max(axis=2).sum()
    assert padded < 1.35 * tokens.sum()


def test_what_makes_one_micro_batch_stays_as_it_is() -> None:
    assert deal_rows(make_steps(3, 8), 8, processes=1, is_joined=True).tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("processes", [1, 2])
def test_the_largest_is_that_which_training_meets(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_POSITIONS_AT_A_TIME", 4 * BATCH)  # and a rest
    lengths = np.random.default_rng(0).integers(1, 99, ROWS)
    count = micro_batch_counter(PLAN | {"processes": processes}, lengths)
    for size in (1, 2, 3, 6, 12 // processes):
        deal = partial(deal_rows, size=size, processes=processes, is_joined=True)
        order = list(
            StreamSampler(
                ROWS,
                steps=STEPS,
                global_batch_size=BATCH,
                seed=SEED,
                deal=lambda rows, deal=deal: rows[deal(lengths[rows][None])[0]],
            )
        )
        met = [sum(lengths[order[start : start + size]]) for start in range(0, len(order), size)]
        assert count(size) == max(met)
    assert count(6) < 6 * lengths.max()


@pytest.mark.parametrize("change", [{"packing": False}, {"steps": 10_000_000}])
def test_what_is_not_looked_at_counts_as_the_longest_allowed(change: dict[str, Any]) -> None:
    assert micro_batch_counter(PLAN | change, np.full(ROWS, 10))(4) == 4 * 99
    assert micro_batch_counter(PLAN, None)(4) == 4 * 99
    assert micro_batch_counter(PLAN, np.full(ROWS, 10))(4) == 4 * 10


def test_the_limit_is_on_positions_not_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MOST_POSITIONS", STEPS * BATCH)
    assert micro_batch_counter(PLAN, np.full(ROWS, 10))(4) == 40
    monkeypatch.setattr(stream, "_MOST_POSITIONS", STEPS * BATCH - 1)
    assert micro_batch_counter(PLAN, np.full(ROWS, 10))(4) == 4 * 99


def test_steps_of_very_many_rows_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MOST_ROWS", BATCH)
    assert micro_batch_counter(PLAN, np.full(ROWS, 10))(4) == 40
    monkeypatch.setattr(stream, "_MOST_ROWS", BATCH - 1)
    assert micro_batch_counter(PLAN, np.full(ROWS, 10))(4) == 4 * 99
