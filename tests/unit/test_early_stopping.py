"""Early stopping: when it stops, that the best weights remain, and that watching changes nothing."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import held_out_loss, load_trained, make_small_plan, read_metrics, save_llama, train_here
from transformers import set_seed

from job.errors import DivergedError
from job.handover import RunFolder
from job.plan import TrainPlan
from job.train import run
from job.train.early_stopping import EarlyStopping

PlanFor = Callable[..., TrainPlan]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def plan(plan_for: PlanFor) -> PlanFor:
    def make(*, patience: int | None = None, interval: int | None = None, **settings: object) -> TrainPlan:
        defaults = {"TRAIN__MAX_STEPS": 12, "TRAIN__LEARNING_RATE": 3e-2, "LORA__DROPOUT": 0.2}
        made = make_small_plan(plan_for, **(defaults | settings))
        return made.model_copy(update={"early_stopping_patience": patience, "eval_interval_steps": interval})

    return make


def watch(losses: Iterable[float], *, steps: int, interval: int = 1, patience: int = 2) -> tuple[EarlyStopping, Any]:
    """Let it see these held-out losses, one each time; return it with what it saw, and the weight that it kept."""
    weight = torch.zeros(1)
    remaining, seen = iter(losses), []
    stopping = EarlyStopping(
        steps=steps,
        interval_steps=interval,
        patience=patience,
        evaluate=lambda: next(remaining),
        gather=lambda: {"weight": weight.clone()},
        record=lambda step, loss: seen.append((step, loss)),
    )
    for step in range(1, steps + 1):
        weight.fill_(float(step))
        is_over = stopping.is_over(step)
        assert is_over == stopping.stopped_early
        if is_over:
            break
    assert stopping.best_loss == min(loss for _, loss in seen)
    return stopping, (seen, stopping.best_weights["weight"].item())


def test_it_stops_when_the_loss_has_not_fallen_and_the_best_remains() -> None:
    stopping, (seen, weight) = watch([3.0, 2.0, 2.5, 2.0, 1.0], steps=5)
    assert seen == [(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0)]  # as low as before is not lower
    assert (stopping.best_step, stopping.stopped_early, weight) == (2, True, 2.0)


def test_progress_in_between_starts_the_patience_anew() -> None:
    stopping, (seen, weight) = watch([3.0, 3.5, 2.0, 2.5, 1.0, 1.5], steps=6)
    assert len(seen) == 6
    assert (stopping.best_step, stopping.stopped_early, weight) == (5, False, 5.0)


def test_it_evaluates_at_the_interval_and_at_the_last_step() -> None:
    stopping, (seen, weight) = watch([3.0, 2.0, 1.0], steps=5, interval=2)
    assert [step for step, _ in seen] == [2, 4, 5]
    assert (stopping.best_step, weight) == (5, 5.0)


def test_a_run_that_ends_as_its_patience_does_was_not_stopped() -> None:
    stopping, (_, weight) = watch([1.0, 2.0, 3.0], steps=3)
    assert (stopping.best_step, stopping.stopped_early, weight) == (1, False, 1.0)


def test_it_goes_on_where_it_was_and_evaluates_no_step_twice() -> None:
    stopping, _ = watch([3.0, 2.0, 2.5], steps=3)
    losses = iter([2.5, 1.0])
    other = EarlyStopping(
        steps=9, interval_steps=2, patience=2, evaluate=lambda: next(losses), gather=dict, record=lambda *_: None
    )
    other.go_on_from(stopping.read_state(), stopping.best_weights)
    assert other.best_weights == {"weight": torch.tensor(2.0)}
    assert not other.is_over(3)  # not its turn
    assert other.is_over(4)  # the second evaluation without progress
    assert (other.best_step, other.best_loss) == (2, 2.0)
    other.evaluate(4)
    assert next(losses) == 1.0


def adapter(root: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(root / "adapter" / "adapter_model.safetensors")
    return weights


def test_watching_changes_nothing(plan: PlanFor, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tied=True)
    learns = {"TRAIN__LEARNING_RATE": 1e-3}
    alone = train_here(plan(**learns), base, tmp_path / "alone")
    watched = train_here(plan(patience=3, interval=2, **learns), base, tmp_path / "watched")
    evaluations = [record for record in read_metrics(tmp_path / "watched") if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [2, 4, 6, 8, 10, 12]
    assert watched["best_step"] == 12  # falls to the end
    assert not watched["stopped_early"]
    assert "best_step" not in alone
    assert watched["eval_loss"] == alone["eval_loss"] == evaluations[-1]["eval_loss"]
    before, after = adapter(tmp_path / "alone"), adapter(tmp_path / "watched")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_weights_are_saved(plan: PlanFor, tmp_path: Path) -> None:
    base, root = save_llama(tmp_path / "base", tied=True), tmp_path / "run"
    # A learning rate with which the random rows are soon learned by heart, and the held-out ones get worse.
    stops = plan(patience=2, interval=1, TRAIN__MAX_STEPS=60, TRAIN__SCHEDULER="constant", TRAIN__LOGGING_STEPS=5)
    result = train_here(stops, base, root)
    metrics = read_metrics(root)
    losses = {int(record["step"]): record["eval_loss"] for record in metrics if "eval_loss" in record}
    assert result["stopped_early"]
    assert result["steps"] == len(losses) == result["best_step"] + 2 < 60
    assert result["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-9)
    assert losses[result["best_step"]] == min(losses.values())
    assert result["eval_loss"] < losses[result["steps"]]
    assert [record["step"] for record in metrics if "loss" in record][-1] == result["steps"]
    assert RunFolder(root).read_last_step() == result["steps"]
    trained = load_trained(base, root / "adapter", vocabulary=100)
    assert held_out_loss(trained, stops, root) == pytest.approx(result["eval_loss"], rel=1e-6)


def test_a_held_out_loss_that_is_no_number_ends_the_run(
    plan: PlanFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 1.9, math.nan])  # of the base model, then of the run
    monkeypatch.setattr(run, "evaluate_rows", lambda *_, **__: np.array([[next(losses), 1]] * 8))
    with pytest.raises(DivergedError, match="step 4 of 12: the held-out loss is nan"):
        train_here(plan(patience=3, interval=2), save_llama(tmp_path / "base", tied=True), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 4, "eval_loss": "nan"}
    assert list((tmp_path / "run" / "adapter").iterdir()) == []


def test_evaluation_draws_no_random_numbers(plan: PlanFor, tmp_path: Path) -> None:
    base, root, the_plan = save_llama(tmp_path / "base", tied=True), tmp_path / "run", plan(TRAIN__MAX_STEPS=1)
    train_here(the_plan, base, root)
    model = load_trained(base, root / "adapter", vocabulary=100)
    model.train()
    set_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    held_out_loss(model, the_plan, root)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert model.training
