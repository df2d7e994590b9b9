"""Checkpoints of a training in this process: every weight, average and number is there again, whatever the optimizer;
and what a wish to stop leads to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from job_cli import without_measurements
from safetensors.torch import load_file
from small_training import make_small_plan, read_metrics, save_llama, train_here

from job.errors import InternalError, PreemptedError
from job.handover import METRICS, SAVED_STEP, TENSORS, TRAINING_STATE, RunFolder, SavedStep, StopRequest
from job.plan import TrainPlan
from job.train import checkpoint_files
from job.train.optimizer_state import read_loss_scale, restore_loss_scale

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning"),
]

STEPS = 8
SAVED = 5


@pytest.fixture
def plan(plan_for: Callable[..., TrainPlan]) -> Callable[..., TrainPlan]:
    def make(**changes: object) -> TrainPlan:
        settings = {"TRAIN__MAX_STEPS": STEPS, "LORA__DROPOUT": 0.2, "LORA__R": 64, "CHECKPOINT__EVERY_STEPS": SAVED}
        return make_small_plan(plan_for, **settings).model_copy(update=changes)

    return make


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "base", tied=True)


def adapter(root: Path) -> bytes:
    return (root / "adapter" / "adapter_model.safetensors").read_bytes()


def saved(root: Path) -> Path:
    [folder] = RunFolder(root).checkpoints.iterdir()
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_it_goes_on_to_the_bit(
    optimizer: str, plan: Callable[..., TrainPlan], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train_here(plan(optimizer=optimizer), base, tmp_path / "whole")
    folder = saved(tmp_path / "whole")
    assert folder.name == f"step-{SAVED:08d}"
    assert {path.name for path in folder.iterdir()} == {TENSORS, TRAINING_STATE, METRICS, SAVED_STEP}
    assert SavedStep.model_validate_json((folder / SAVED_STEP).read_text()).step == SAVED
    tensors = load_file(folder / TENSORS)
    names = [name.removeprefix("weight/") for name in tensors if name.startswith("weight/")]
    averages = {"adamw": "exp_avg", "paged_adamw_8bit": "state1"}[optimizer]
    assert {f"optimizer/{name}/{averages}" for name in names} <= tensors.keys()
    assert any(tensor.dtype == torch.uint8 for name, tensor in tensors.items() if name.endswith("/state1")) == (
        optimizer == "paged_adamw_8bit"
    )

    caplog.set_level("INFO")
    torch.manual_seed(123)  # nothing of this process's own state may matter
    resumed = train_here(plan(optimizer=optimizer), base, tmp_path / "resumed", resume=folder)
    assert f"going on from step {SAVED} of {STEPS}" in caplog.text
    assert adapter(tmp_path / "resumed") == adapter(tmp_path / "whole")
    for name in ("steps", "tokens", "train_loss", "eval_loss", "eval_loss_base"):
        assert resumed[name] == whole[name], name
    assert resumed["train_seconds"] > 0
    evaluations = [(tmp_path / run / "evaluation.json").read_text() for run in ("whole", "resumed")]
    assert evaluations[0] == evaluations[1]  # the base model's rows are those from before the first step
    assert len(json.loads(evaluations[0])["rows"]) == 8
    records = [
        [without_measurements(record) for record in read_metrics(tmp_path / run)] for run in ("whole", "resumed")
    ]
    assert records[0] == records[1]
    assert whole["train_loss"] == pytest.approx(sum(record["loss"] for record in records[0]) / STEPS)
    if optimizer == "adamw":
        _go_on_otherwise(plan, base, tmp_path, folder, caplog)


def _go_on_otherwise(
    plan: Callable[..., TrainPlan], base: Path, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    smaller = plan(micro_batch_size=1, gradient_accumulation_steps=4)
    train_here(smaller, base, tmp_path / "smaller", resume=folder)
    assert "micro_batch_size 4, then 1; gradient_accumulation_steps 1, then 4" in caplog.text
    assert "sums are rounded otherwise, dropout draws other random numbers" in caplog.text
    assert adapter(tmp_path / "smaller") != adapter(tmp_path / "whole")
    other = plan(gradient_accumulation_steps=2, global_batch_size=8)
    with pytest.raises(InternalError, match="the checkpoint is of another run: step 5, global batch 4"):
        train_here(other, base, tmp_path / "other", resume=folder)

    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / TRAINING_STATE).write_text('{"schema_version": 2}')
    train_here(plan(), base, tmp_path / "anew", resume=damaged)
    assert "the checkpoint can't be gone on from, so training begins at step 0" in caplog.text
    assert adapter(tmp_path / "anew") == adapter(tmp_path / "whole")


def test_a_wish_to_stop_or_to_finish(
    plan: Callable[..., TrainPlan], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PreemptedError, match=f"stopped after step 1 of {STEPS}"):
        train_here(plan(), base, tmp_path / "stopped", stop=StopRequest(reason="SIGTERM"))
    assert saved(tmp_path / "stopped").name == "step-00000001"
    assert not (tmp_path / "stopped" / "result.json").exists()

    watched = plan(early_stopping_patience=3, eval_interval_steps=4, logging_steps=4)
    stop = StopRequest(reason="SFT_RUNTIME__MAX_HOURS=1", finish=True)
    resume = saved(tmp_path / "stopped")
    state = json.loads((resume / TRAINING_STATE).read_text()) | {
        "stopping": {"best_step": 0, "best_loss": None, "without_progress": 0}
    }
    (resume / TRAINING_STATE).write_text(json.dumps(state))
    result = train_here(watched, base, tmp_path / "finished", resume=resume, stop=stop)
    assert result["stopped_by"] == "SFT_RUNTIME__MAX_HOURS=1"
    assert (result["steps"], result["best_step"], result["stopped_early"]) == (2, 2, False)
    records = read_metrics(tmp_path / "finished")
    assert [(record["step"], "loss" in record) for record in records] == [(1, True), (2, True), (2, False)]
    assert result["eval_loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-9)
    assert f"ending at step 2 of {STEPS} (SFT_RUNTIME__MAX_HOURS=1), so the learning rate has not fallen" in caplog.text
    assert not RunFolder(tmp_path / "finished").checkpoints.exists()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    plan: Callable[..., TrainPlan],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_file = checkpoint_files.save_file

    def run_out_of_room(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        if "00000002" not in str(path):
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_files, "save_file", run_out_of_room)
    train_here(plan(checkpoint_every_steps=2), base, tmp_path / "run")
    assert "step 4: the checkpoint can't be saved ([Errno 28] No space left on device" in caplog.text
    assert "give SFT_RUNTIME__WORK_DIR more room" in caplog.text
    assert saved(tmp_path / "run").name == "step-00000002"


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_the_loss_scale_goes_on(engine: str, plan: Callable[..., TrainPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # there is no process group
    half = plan(engine=engine, dtype="float16")

    def make_trainer() -> Any:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(2.0**16, 3, 1, 2, False)
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
        grad_scaler.scale(torch.ones(1))
        wrapped = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return SimpleNamespace(accelerator=SimpleNamespace(scaler=grad_scaler), model_wrapped=wrapped)

    def step(trainer: Any, *, overflows: bool) -> float:
        if engine == "zero2":
            trainer.model_wrapped.optimizer.loss_scaler.update_scale(overflows)
        else:
            scaler = trainer.accelerator.scaler
            weight = torch.nn.Parameter(torch.ones(1))
            weight.grad = torch.full((1,), torch.inf if overflows else 1.0)
            optimizer = torch.optim.SGD([weight])
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        read = read_loss_scale(trainer, half)
        assert read is not None
        return read.scale

    pattern = [True, False, True, True, False, False, False, False, True, False, False, False]
    whole = make_trainer()
    expected = [step(whole, overflows=overflows) for overflows in pattern]
    assert len(set(expected)) > 2
    for stop in range(len(pattern)):
        first, second = make_trainer(), make_trainer()
        scales = [step(first, overflows=overflows) for overflows in pattern[:stop]]
        restore_loss_scale(second, half, read_loss_scale(first, half))
        assert scales + [step(second, overflows=overflows) for overflows in pattern[stop:]] == expected
