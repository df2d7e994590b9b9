"""How many tokens the largest micro batch of a run has, before it begins."""

from typing import Any

import numpy as np
import pytest

from job import stream
from job.stream import micro_batch_counter
from job.train.dataset import StreamSampler

ROWS, STEPS, BATCH, SEED = 37, 11, 12, 5
PLAN: dict[str, Any] = {
    "packing": True,
    "max_length_tokens": 99,
    "steps": STEPS,
    "global_batch_size": BATCH,
    "seed": SEED,
}


def test_the_largest_is_that_which_training_meets() -> None:
    lengths = np.random.default_rng(0).integers(1, 99, ROWS)
    order = list(StreamSampler(ROWS, steps=STEPS, global_batch_size=BATCH, seed=SEED))
    count = micro_batch_counter(PLAN, lengths)
    for size in (1, 2, 3, 4, 6, 12):
        met = [sum(lengths[order[start : start + size]]) for start in range(0, len(order), size)]
        assert count(size) == max(met)
    assert count(12) < 12 * lengths.max()


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
