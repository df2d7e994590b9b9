"""A run that is killed and started again on a fresh node ends in the very adapter of one that nobody disturbed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from job_cli import ROOT, SHOP, Ended, job_environment, run_job, without_measurements
from running_job import RunningJob
from safetensors.torch import load

STEPS = 10
FIRST_SAVED = 4

# A NaN in the loss of one forward pass that learns, on one rank: its number is in NAN_AT, beginning with 1.
SITECUSTOMIZE = """
import os, sys
from itertools import pairwise

if ("-m", "job.train.worker") in pairwise(sys.orig_argv) and int(os.environ.get("RANK", 0)) == 1:
    import torch

    calls = 0
    embed = torch.nn.Embedding.forward

    def forward(self, ids):
        global calls
        calls += torch.is_grad_enabled()
        return embed(self, ids) * (float("nan") if calls == int(os.environ["NAN_AT"]) else 1)

    torch.nn.Embedding.forward = forward
"""


def make_environment(folder: Path, model: Path, **settings: object) -> dict[str, str]:
    """Return the environment of a job that draws random numbers and has something of everything that is saved."""
    folder.mkdir(exist_ok=True)
    fixed: dict[str, object] = {
        "MODEL__ID": model,
        "MODEL__DTYPE": "float32",
        "DATA__URI": SHOP / "train.jsonl",
        "OUTPUT__URI": folder / "slot",
        "LORA__DROPOUT": 0.1,
        "TRAIN__MAX_STEPS": STEPS,
        "TRAIN__GLOBAL_BATCH_SIZE": 8,
        "TRAIN__MICRO_BATCH_SIZE": 2,
        "TRAIN__LOSS": "full",  # the longest steps, so that what happens in their midst can be met
        "TRAIN__WARMUP": 5,  # the first checkpoint is in the midst of it
        "TRAIN__LEARNING_RATE": 5e-3,
        "TRAIN__PACKING": "true",
        "TRAIN__LOGGING_STEPS": 3,  # of which a checkpoint after 4 steps has one and a part of the next
        "CHECKPOINT__EVERY_STEPS": FIRST_SAVED,
    }
    return job_environment(folder, **(fixed | settings))


@dataclass(frozen=True)
class Published:
    """What a job has published."""

    adapter: bytes
    records: list[dict[str, Any]]  # of metrics.jsonl, without what was measured
    metrics: dict[str, Any]
    output: str

    @property
    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records if "loss" in record}


def read_published(ended: Ended) -> Published:
    assert ended.code == 0, ended.output
    slot = Path(ended.outcome["output"])
    lines = (slot / "metrics.jsonl").read_text().splitlines()
    records = [without_measurements(record) for record in map(json.loads, lines) if "phases" not in record]
    metrics = json.loads((slot / "manifest.json").read_text())["metrics"]
    assert not (slot / "checkpoint").exists()
    return Published((slot / "adapter_model.safetensors").read_bytes(), records, metrics, ended.output)


def kill_after_checkpoint(environment: dict[str, str], step: int = FIRST_SAVED) -> None:
    """Kill all processes of a job at once when this checkpoint is in the store, and take the node's disk away."""
    with RunningJob(environment) as job:
        job.wait_for(f"checkpoint of step {step} is in the store")
        for process in job.descendants():
            process.kill()
        job.process.kill()
        job.process.wait()
    shutil.rmtree(environment["SFT_RUNTIME__WORK_DIR"])


@pytest.mark.parametrize(
    ("engine", "processes"), [("ddp", 1), ("ddp", 2), ("ddp", 4), ("zero2", 1), ("zero2", 2), ("zero3", 2)]
)
def test_a_killed_run_ends_in_the_same_adapter(engine: str, processes: int, tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"PARALLEL__ENGINE": engine, "PARALLEL__PROCESSES": processes}
    settings |= {"TRAIN__MICRO_BATCH_SIZE": 1} if processes == 4 else {}
    whole = read_published(run_job(make_environment(tmp_path / "whole", tiny_model, **settings)))
    assert "going on" not in whole.output

    environment = make_environment(tmp_path / "killed", tiny_model, **settings)
    kill_after_checkpoint(environment)
    resumed = read_published(run_job(environment))
    assert f"going on from step {FIRST_SAVED} of {STEPS}\n" in resumed.output
    assert resumed.adapter == whole.adapter
    assert resumed.records == whole.records
    assert [record["step"] for record in resumed.records] == [1, 3, 6, 9, 10]
    for name in ("steps", "tokens", "train_loss", "eval_loss", "eval_loss_base"):
        assert resumed.metrics[name] == whole.metrics[name], name


def test_other_processes_and_engines_learn_from_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"LORA__DROPOUT": 0, "TRAIN__LOGGING_STEPS": 1}
    ways: dict[str, dict[str, object]] = {
        "world_size 2, then 1": {"PARALLEL__PROCESSES": 1},
        "engine ddp, then zero2": {"PARALLEL__ENGINE": "zero2", "PARALLEL__PROCESSES": 2},
    }
    two: dict[str, object] = {"PARALLEL__ENGINE": "ddp", "PARALLEL__PROCESSES": 2}
    killed = make_environment(tmp_path / "killed", tiny_model, **settings, **two)
    kill_after_checkpoint(killed)
    folders = {name: tmp_path / str(number) for number, name in enumerate(ways)}
    for folder in folders.values():
        shutil.copytree(tmp_path / "killed" / "slot", folder / "slot")
    whole = read_published(run_job(killed))  # that it goes on exactly is shown above
    for name, way in ways.items():
        other = read_published(run_job(make_environment(folders[name], tiny_model, **settings, **way)))
        assert f"going on from step {FIRST_SAVED} of {STEPS} with the rows that come next, but not to" in other.output
        assert name in other.output
        assert other.losses.keys() == whole.losses.keys() == set(range(1, STEPS + 1))
        for step, loss in other.losses.items():
            assert loss == pytest.approx(whole.losses[step], abs=1e-5), (name, step)
        expected = load(whole.adapter)
        for part, weight in load(other.adapter).items():
            assert torch.allclose(weight, expected[part], atol=5e-4), (name, part)  # of steps of 5e-3


def test_early_stopping_goes_on_with_its_patience_and_its_best(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "DATA__URI": write_colours(tmp_path / "train.jsonl", numbers=(1, 4), shift=1),
        "DATA__EVAL_URI": write_colours(tmp_path / "eval.jsonl", numbers=(2, 3), shift=3),
        "TRAIN__MAX_STEPS": 100,
        "TRAIN__LEARNING_RATE": 2e-2,
        "TRAIN__SCHEDULER": "constant",
        "TRAIN__EARLY_STOPPING_PATIENCE": 3,
        "CHECKPOINT__EVERY_STEPS": 1,
        "CHECKPOINT__KEEP": 100,
    }
    whole = read_published(run_job(make_environment(tmp_path / "whole", tiny_model, **settings)))
    best, last = whole.metrics["best_step"], whole.metrics["steps"]
    assert whole.metrics["stopped_early"]

    environment = make_environment(tmp_path / "killed", tiny_model, **settings)
    kill_after_checkpoint(environment, step=last - 1)  # the best is behind, and the patience almost over
    assert best < last - 1
    resumed = read_published(run_job(environment))
    assert resumed.metrics["best_step"] == best
    assert resumed.metrics["steps"] == last
    assert resumed.adapter == whole.adapter
    assert resumed.records == whole.records


def test_a_run_that_diverges_ends_at_that_step_and_its_checkpoint_stays(tiny_model: Path, tmp_path: Path) -> None:
    environment = make_environment(
        tmp_path, tiny_model, PARALLEL__PROCESSES=2, DATA__EVAL_FRACTION=0, TRAIN__PACKING="false"
    )
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    # Two micro batches a step on each of two processes: the second one of step 7, and only on the second process.
    ended = run_job(environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NAN_AT": "14"})
    assert ended.code == 80, ended.output
    assert ended.outcome["step"] == 7
    assert f"step 7 of {STEPS}: loss nan, gradient norm nan, learning rate 0.00" in ended.outcome["message"]
    assert f"; the rows of this step: {SHOP / 'train.jsonl'}:" in ended.outcome["message"]
    lines = ended.outcome["message"].rsplit(":", 1)[1].split(", ")
    assert len(lines) == 8
    assert "SFT_TRAIN__LEARNING_RATE=0.0013" in ended.outcome["hint"]
    assert f"the checkpoint after step {FIRST_SAVED}, from before it, stays" in ended.outcome["hint"]
    assert "step 8/" not in ended.output
    kept = [path.parent.name for path in (tmp_path / "slot").rglob("checkpoint.json")]
    assert kept == [f"step-{FIRST_SAVED:08d}"]


def write_colours(path: Path, *, numbers: tuple[int, int], shift: int) -> Path:
    """Write questions whose answers follow from nothing: learned by heart, they make other ones worse."""
    words = ["red", "green", "blue", "black", "white", "pink", "grey", "gold"]
    pairs = [
        {"prompt": f"{word} {number}", "completion": words[(place * shift + number) % 8]}
        for place, word in enumerate(words)
        for number in numbers
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
