"""Losses that say that training goes wrong, and those of a run that goes well."""

import math

import numpy as np
import pytest

from job.train.divergence import SPIKE_WINDOW_STEPS, has_diverged, has_exploded, is_spike

STEPS = 5_000


def made_up_losses(kind: str) -> np.ndarray:
    """Return the losses of a run that learns, (STEPS,), with the noise of its batches."""
    random = np.random.default_rng(0)
    falling = 1.0 + 2.0 * np.exp(-np.arange(STEPS) / 200)
    noisy = {
        "large batches": falling + random.normal(0, 0.15, STEPS),
        "small batches": np.maximum(0.01, falling + random.normal(0, 0.5, STEPS)),
        "single rows": falling * np.exp(random.normal(0, 0.6, STEPS)),
        "short answers": falling * random.gamma(2, 0.5, STEPS),
        "learned by heart": 0.3 * random.exponential(1, STEPS),
        "one row in ten is hard": np.where(random.random(STEPS) < 0.1, 4, 1) * np.exp(random.normal(0, 0.1, STEPS)),
    }
    return noisy[kind]


def count_spikes(losses: np.ndarray) -> int:
    windows = ((losses[max(0, step - SPIKE_WINDOW_STEPS) : step].tolist(), losses[step]) for step in range(len(losses)))
    return sum(is_spike(loss, before) for before, loss in windows)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("large batches", 0),
        ("small batches", 0),
        ("single rows", STEPS // 500),
        ("short answers", STEPS // 500),
        ("learned by heart", STEPS // 500),
        ("one row in ten is hard", STEPS // 500),
    ],
)
def test_noise_is_no_spike(kind: str, most: int) -> None:
    assert count_spikes(made_up_losses(kind)) <= most


@pytest.mark.parametrize(("kind", "jump"), [("large batches", 2.0), ("small batches", 8.0), ("learned by heart", 8.0)])
def test_a_jump_is_a_spike(kind: str, jump: float) -> None:
    before = made_up_losses(kind)[1000 : 1000 + SPIKE_WINDOW_STEPS].tolist()
    assert is_spike(float(np.median(before)) + jump, before)
    assert not is_spike(float(np.median(before)) + jump, before[:19])  # too few to tell
    assert not is_spike(0.0, before)


def test_a_rise_of_less_than_a_nat_is_no_spike() -> None:
    assert not is_spike(1.01, [0.02] * SPIKE_WINDOW_STEPS)
    assert is_spike(1.03, [0.02] * SPIKE_WINDOW_STEPS)


def test_what_is_no_number_has_diverged() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert has_diverged(math.nan, 1.0, dtype)
        assert has_diverged(math.inf, 1.0, dtype)
        assert not has_diverged(1e6, 1e6, dtype)
    for norm in (math.nan, math.inf, -1.0):  # -1 is DeepSpeed's
        assert has_diverged(2.0, norm, "bfloat16")
        assert not has_diverged(2.0, norm, "float16")  # the loss scale overflows, and that step is skipped


def test_a_loss_that_ends_far_above_its_start_has_exploded() -> None:
    falling = [3.0 - 0.05 * step for step in range(40)]
    assert not has_exploded(falling)
    assert has_exploded(falling[::-1])
    assert not has_exploded([2.0, 3.5] * 20)  # noisy, and going nowhere
    assert not has_exploded([2.0] * 10 + [4.0] * 9)  # too few to tell
