"""A whole run, watched by programs: every line of its log is a documented event, and TensorBoard and MLflow have the
numbers of metrics.jsonl."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from job_cli import SHOP, job_environment, run_job

from job.log import EVENTS

COMMON = {"time", "level", "event", "message"}
STEP_NUMBERS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_s", "data_wait_s", "memory_bytes")


@dataclass(frozen=True)
class Watched:
    """A run that has ended: its log, what it wrote down, and where the trackers' files are."""

    lines: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    run_id: str
    metrics: dict[str, Any]
    mlflow_uri: str
    tensorboard: Path


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("live")
    mlflow_uri = f"file://{folder / 'mlruns'}"
    environment = job_environment(
        folder,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=folder / "slot",
        TRAIN__MAX_STEPS=5,
        TRAIN__LOGGING_STEPS=2,
        CHECKPOINT__EVERY_STEPS=3,
        RUNTIME__LOG_FORMAT="auto",
        RUNTIME__REPORT_TO="tensorboard,mlflow",
    )
    environment |= {"MLFLOW_TRACKING_URI": mlflow_uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    run_id = ended.outcome["run_id"]
    lines = (folder / "slot" / "metrics.jsonl").read_text().splitlines()
    return Watched(
        lines=[json.loads(line) for line in ended.output.splitlines()],
        steps=[step for step in map(json.loads, lines) if "loss" in step],
        run_id=run_id,
        metrics=json.loads((folder / "slot" / "manifest.json").read_text())["metrics"],
        mlflow_uri=mlflow_uri,
        tensorboard=folder / "work" / "tensorboard" / run_id,
    )


def test_every_line_is_a_documented_event(run: Watched) -> None:
    for line in run.lines:
        documented = EVENTS[line["event"]].fields.keys()
        assert line.keys() >= COMMON, line
        assert line.keys() - COMMON <= documented, line
        assert documented - line.keys() <= {"traceback"}, line


def test_the_events_tell_the_run(run: Watched) -> None:
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in run.lines:
        by_event.setdefault(line["event"], []).append(line)
    assert by_event.keys() >= EVENTS.keys() - {"transfer", "error"}
    assert [line["phase"] for line in by_event["phase"]][-2:] == ["training", "publishing"]
    [plan] = by_event["plan"]
    assert (plan["run_id"], plan["total_steps"]) == (run.run_id, 5)
    assert [line["step"] for line in by_event["evaluation"]] == [0, 5]
    assert by_event["evaluation"][1]["eval_loss"] == run.metrics["eval_loss"]
    assert [line["step"] for line in by_event["checkpoint"]] == [3]
    assert by_event["published"][0]["uri"] == by_event["ended"][0]["output"]
    ended = run.lines[-1]
    assert (ended["event"], ended["code"], ended["step"], ended["total_steps"]) == ("ended", 0, 5, 5)
    assert not ended["hint"]


def test_the_steps_are_those_of_the_metrics(run: Watched) -> None:
    logged = [line for line in run.lines if line["event"] == "step"]
    assert [line["step"] for line in logged] == [1, 2, 4, 5]
    for line, step in zip(logged, run.steps, strict=True):
        assert {name: line[name] for name in step} == step
        assert all(isinstance(line[name], float | int) for name in (*STEP_NUMBERS, "eta_s"))
        assert 0 < step["data_wait_s"] < step["step_s"]
    assert logged[0]["eta_s"] > logged[2]["eta_s"] > 0
    tokens = run.steps[2]["tokens"] - run.steps[1]["tokens"]
    assert run.steps[2]["tokens_per_second"] == pytest.approx(tokens / (2 * run.steps[2]["step_s"]), rel=0.01)


def test_mlflow_has_the_numbers(run: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(run.mlflow_uri)
        experiment = client.get_experiment_by_name("sft-job")
        assert experiment is not None
        [tracked] = client.search_runs([experiment.experiment_id])
        history = {
            name: {point.step: point.value for point in client.get_metric_history(tracked.info.run_id, name)}
            for name in tracked.data.metrics
        }
    assert (tracked.info.run_name, tracked.info.status) == (run.run_id, "FINISHED")
    assert (tracked.data.params["lora_r"], tracked.data.params["global_batch_size"]) == ("16", "8")
    for name in STEP_NUMBERS:
        assert history[name] == {step["step"]: step[name] for step in run.steps}
    assert history["eval_loss"] == {0: run.metrics["eval_loss_base"], 5: run.metrics["eval_loss"]}


def test_tensorboard_has_the_numbers(run: Watched) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.tensorboard))
        events.Reload()
    for name in STEP_NUMBERS:
        points = {point.step: point.value for point in events.Scalars(f"train/{name}")}
        assert points == pytest.approx({step["step"]: step[name] for step in run.steps})
    points = {point.step: point.value for point in events.Scalars("eval/loss")}
    assert points == pytest.approx({0: run.metrics["eval_loss_base"], 5: run.metrics["eval_loss"]})


def test_a_tracker_that_is_not_installed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "wandb").mkdir()  # W&B itself leaves such folders
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        RUNTIME__REPORT_TO="mlflow,wandb",
    )
    ended = run_job(environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}:{tmp_path / 'none'}"}, "check")
    assert ended.code == 78
    assert ended.outcome["message"] == "SFT_RUNTIME__REPORT_TO=mlflow,wandb: the package wandb is not installed"
    assert "pip install 'sft-job[wandb]'" in ended.outcome["hint"]
