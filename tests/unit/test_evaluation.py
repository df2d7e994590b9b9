"""The interval of a difference: what it must hold, and what it must not be fooled by."""

import time
import tracemalloc

import numpy as np
import pytest

from job.evaluation import LossChange, RowLoss, compare_losses, find_interval


def make_rows(before: list[float], after: list[float], tokens: list[int]) -> list[RowLoss]:
    return [
        RowLoss(line=f"eval.jsonl:{number}", supervised_tokens=count, loss_base=base, loss=loss)
        for number, (base, loss, count) in enumerate(zip(before, after, tokens, strict=True), start=1)
    ]


def test_every_token_weighs_the_same() -> None:
    change = compare_losses(make_rows([2.0, 4.0], [1.0, 4.0], [30, 10]))
    assert (change.rows, change.supervised_tokens) == (2, 40)
    assert change.loss_base == pytest.approx(2.5)
    assert change.loss == pytest.approx(1.75)
    assert change.change == pytest.approx(-0.75)
    assert change.perplexity_base == pytest.approx(np.exp(2.5))
    assert (change.change_low, change.change_high) == (pytest.approx(-1), 0)


def test_rows_are_paired() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(3, 1, 200)  # rows differ by far more than the adapter changes each of them
    after = base - 0.05 + generator.normal(0, 0.01, 200)
    tokens = [20] * 200
    paired = compare_losses(make_rows(list(base), list(after), tokens))
    assert -0.055 < paired.change_low < paired.change < paired.change_high < -0.045
    shuffled = compare_losses(make_rows(list(base), list(generator.permutation(after)), tokens))
    assert shuffled.change == pytest.approx(paired.change)
    assert shuffled.change_low < -0.1
    assert shuffled.change_high > 0


def test_rows_that_are_all_alike_and_one_row_give_a_point() -> None:
    tied = compare_losses(make_rows([2.0] * 20, [1.5] * 20, [7] * 20))
    assert tied.change_low == tied.change_high == tied.change == -0.5
    one = compare_losses(make_rows([2.0], [1.5], [7]))
    assert one.change_low == one.change_high == -0.5
    assert one.doubt() == "one held-out row is too few to tell what others are like, whatever the interval says"


def test_nineteen_intervals_of_twenty_hold_the_true_change() -> None:
    generator = np.random.default_rng(1)
    trials, rows, true_change = 400, 60, -0.1
    hits = 0
    for _ in range(trials):
        # Long answers change less, so that whoever takes the mean over rows, or draws tokens, misses.
        tokens = generator.integers(5, 200, rows).astype(np.float64)
        changes = tokens * (true_change + 30 * (1 / tokens - _mean_of_inverse()) + generator.normal(0, 0.5, rows))
        low, high = find_interval(changes, tokens)
        hits += low < true_change < high
    assert 0.92 < hits / trials < 0.98  # 95 % but for chance, and for the rows being 60


def _mean_of_inverse() -> float:
    """Return what 1 / tokens is on the average over tokens."""
    counts = np.arange(5, 200)
    return float(len(counts) / counts.sum())


def test_the_same_rows_give_the_same_interval() -> None:
    rows = make_rows([2.0, 3.0, 2.5], [1.0, 2.9, 2.6], [3, 9, 4])
    assert compare_losses(rows) == compare_losses(rows)


def test_a_hundred_thousand_rows_take_little_time_and_memory() -> None:
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 300, 100_000).astype(np.float64)
    changes = tokens * generator.normal(-0.1, 1, 100_000)
    tracemalloc.start()
    started_s = time.process_time()
    low, high = find_interval(changes, tokens)
    spent_s = time.process_time() - started_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent_s < 30
    assert peak_bytes < 150e6
    assert high - low == pytest.approx(2 * 1.96 * (tokens**2).sum() ** 0.5 / tokens.sum(), rel=0.1)


@pytest.mark.parametrize(
    ("low", "high", "rows", "doubt"),
    [
        (-0.5, -0.1, 40, None),
        (-0.5, -0.1, 3, "3 held-out rows are too few"),
        (-0.5, 0.1, 40, "by chance"),
        (0.1, 0.5, 40, "worse than the base model"),
    ],
)
def test_the_verdict(low: float, high: float, rows: int, doubt: str | None) -> None:
    change = LossChange(
        rows=rows, supervised_tokens=400, loss_base=2, loss=1.7, change=-0.3, change_low=low, change_high=high
    )
    said = change.doubt()
    assert said is None if doubt is None else doubt in (said or "")
    assert "perplexity 7.389 before, 5.474 after; the loss changed by -0.3000" in change.describe()
