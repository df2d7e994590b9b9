"""How long and how fast: the arithmetic of steps, passes, warmup and learning rates, and what is too little of them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import get_scheduler

from job.errors import ConfigError
from job.schedule import (
    Scheduler,
    choose_epochs,
    choose_logging_steps,
    count_steps,
    count_steps_per_pass,
    count_warmup_steps,
    limit_warmup_steps,
    sum_learning_rates,
    warn_of_few_steps,
    warn_of_little_learning,
    warn_of_long_warmup,
    warn_of_repeated_rows,
)

STEPS = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("epochs", "rows", "global_batch", "steps"),
    [(1, 80, 8, 10), (1, 81, 8, 11), (3, 27, 9, 9), (0.1, 30, 1, 3), (0.01, 10, 8, 1), (1, 1, 8, 1), (2.5, 100, 8, 32)],
)
def test_steps_cover_the_epochs(epochs: float, rows: int, global_batch: int, steps: int) -> None:
    assert count_steps(epochs, rows, global_batch) == steps


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 10, 0),
        (0.03, 100, 3),
        (0.03, 30, 0),
        (0.1, 30, 3),
        (1, 2, 1),
        (9, 10, 9),
        (0.03, 1, 0),
        (0.99, 3, 2),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.9999999999999, 10, 9),
    ],
)
def test_warmup(warmup: float, steps: int, expected: int) -> None:
    assert count_warmup_steps(warmup, steps) == expected


@pytest.mark.parametrize(
    ("warmup", "steps", "percent", "proposal"), [(100, 50, 49, 5), (10, 10, 90, 1), (20, 2, 5, 0), (1, 1, 0, 0)]
)
def test_a_warmup_as_long_as_the_run_is_refused(warmup: float, steps: int, percent: int, proposal: int) -> None:
    with pytest.raises(
        ConfigError, match=f"SFT_TRAIN__WARMUP={warmup}: the run has {steps} steps?,.* {percent} %"
    ) as e:
        count_warmup_steps(warmup, steps)
    assert e.value.hint.startswith(f"use SFT_TRAIN__WARMUP={proposal},")
    assert count_warmup_steps(proposal, steps) == proposal  # what is proposed works


@given(STEPS, st.one_of(st.floats(0, 1, exclude_max=True), st.integers(1, 1000)))
def test_a_warmup_that_nobody_asked_for_takes_a_tenth_at_most(steps: int, warmup: float) -> None:
    warmup_steps, rule = limit_warmup_steps(warmup, steps)
    assert 0 <= 10 * warmup_steps <= steps
    assert (rule == "") == (warmup_steps == (int(warmup * steps + 1e-9) if warmup < 1 else warmup))


@given(STEPS, st.one_of(st.floats(0, 1, exclude_max=True), st.integers(1, 1000)))
@example(10, 1)
@example(10, 2)
@example(19, 2)
def test_a_warmup_that_was_asked_for_is_kept_warned_of_or_refused(steps: int, warmup: float) -> None:
    try:
        warmup_steps = count_warmup_steps(warmup, steps)
    except ConfigError:
        assert warmup >= steps
        return
    assert warmup_steps < steps
    assert bool(warn_of_long_warmup(warmup, warmup_steps, steps)) == (10 * warmup_steps > steps)


@given(st.integers(1, 100_000), st.integers(1, 512))
def test_passes_are_3_to_10_and_no_more_than_about_50_steps_need(rows: int, batch: int) -> None:
    passes, source = choose_epochs(rows, batch)
    assert 3 <= passes <= 10
    assert count_steps(passes, rows, batch) >= 50 or passes == 10
    assert passes == 3 or (passes - 1) * rows < 50 * batch
    assert source.startswith("rule few-rows: ") == (passes > 3)


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (50, 1), (199, 1), (200, 2), (1000, 10), (12345, 123)])
def test_logging_interval(steps: int, interval: int) -> None:
    assert choose_logging_steps(steps)[0] == interval


@pytest.mark.parametrize(("rows", "batch", "steps"), [(36, 1, 36), (78, 8, 10), (3, 8, 1), (100, 8, 12)])
def test_steps_of_a_pass(rows: int, batch: int, steps: int) -> None:
    assert count_steps_per_pass(rows, batch) == steps


@pytest.mark.parametrize(
    ("scheduler", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (10, 0), (10, 1), (10, 9), (37, 3), (90, 2), (360, 10)])
def test_the_sum_of_learning_rates_is_that_of_transformers_schedule(
    scheduler: Scheduler, name: str, steps: int, warmup: int
) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    total = 0.0
    for _ in range(steps):
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert sum_learning_rates(steps, warmup, scheduler, 3e-4) == pytest.approx(total, rel=1e-9)


def test_adam_moves_no_weight_further_than_the_sum() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        (weight * torch.tensor([1.0, -5.0, 1e-3, 100.0])).sum().backward()  # always the same way: the furthest
        optimizer.step()
        schedule.step()
    total = sum_learning_rates(40, 0, "cosine", 1e-3)
    assert weight.abs().max().item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "scheduler", "peak", "warned"),
    [
        (360, "cosine", 5e-6, False),  # 36 rows, batch 1, 10 epochs
        (45, "cosine", 5e-6, True),  # the same rows at batch 8
        (50, "cosine", 5e-5, False),  # 78 rows with a preset
        (100, "constant", 5e-6, False),
        (99, "constant", 5e-6, True),
    ],
)
def test_too_little_learning(steps: int, scheduler: Scheduler, peak: float, warned: bool) -> None:
    assert bool(warn_of_little_learning(steps, 0, scheduler, peak, by_max_steps=False)) == warned


@given(st.integers(1, 19), STEPS, st.integers(1, 64))
def test_the_epochs_that_a_short_run_is_told_give_enough_steps(steps: int, rows: int, batch: int) -> None:
    (warning,) = warn_of_few_steps(steps, rows, batch, by_max_steps=False)
    epochs = int(warning.split("SFT_TRAIN__EPOCHS=")[1].split()[0])
    assert warn_of_few_steps(count_steps(epochs, rows, batch), rows, batch, by_max_steps=False) == []
    assert "SFT_TRAIN__MAX_STEPS to 20" in warn_of_few_steps(steps, rows, batch, by_max_steps=True)[0]


@pytest.mark.parametrize(
    ("rows", "batch", "multiple", "remedy"),
    [
        (1, 8, 1, "SFT_TRAIN__GLOBAL_BATCH_SIZE=1"),
        (7, 8, 2, "SFT_TRAIN__GLOBAL_BATCH_SIZE=6"),
        (3, 8, 4, "fewer processes"),
    ],
)
def test_a_batch_beyond_the_rows(rows: int, batch: int, multiple: int, remedy: str) -> None:
    assert f"; {remedy}" in warn_of_repeated_rows(rows, batch, multiple=multiple)[0]
    assert warn_of_repeated_rows(batch, batch, multiple=multiple) == []
