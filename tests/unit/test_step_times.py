"""How long steps take, as it is written down: with the wait for rows, and without what takes place between steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_training import make_small_plan, read_metrics, save_llama, train_here

from job.plan import TrainPlan
from job.train import run
from job.train.dataset import PadRows
from job.train.evaluate import mean_loss

WAIT_S = 0.05  # for each of a step's two micro batches
PAUSE_S = 1.0


class SlowRows(PadRows):
    def __call__(self, rows: Any) -> Any:
        time.sleep(WAIT_S)
        return super().__call__(rows)


def evaluate_slowly(losses: np.ndarray) -> float:
    time.sleep(PAUSE_S)
    return mean_loss(losses)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_rows_that_are_slow_and_evaluations_in_between(
    plan_for: Callable[..., TrainPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_small_plan(
        plan_for, TRAIN__MICRO_BATCH_SIZE=2, TRAIN__LOGGING_STEPS=2, TRAIN__EARLY_STOPPING_PATIENCE=9
    )
    assert (plan.steps, plan.eval_interval_steps, plan.gradient_accumulation_steps) == (6, 4, 2)
    monkeypatch.setattr(run, "PadRows", SlowRows)
    monkeypatch.setattr(run, "mean_loss", evaluate_slowly)
    train_here(plan, save_llama(tmp_path / "model", tied=True), tmp_path / "run")
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 6]
    for line in steps:
        # accelerate fetches a micro batch ahead: the first step waits for three, the last for one
        assert WAIT_S / 2 <= line["data_wait_s"] < line["step_s"]
    middle, last = steps[2], steps[3]
    assert middle["data_wait_s"] >= 2 * WAIT_S
    assert last["step_s"] < PAUSE_S / 2  # though the held-out loss was looked at after step 4 ...
    assert last["elapsed_s"] - middle["elapsed_s"] > PAUSE_S  # ... which is part of the run's time
    assert middle["tokens_per_second"] == pytest.approx(2 * 4 * 12 / (2 * middle["step_s"]), rel=0.02)
    assert middle["memory_bytes"] <= last["memory_bytes"]
