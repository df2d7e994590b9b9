"""SIGTERM while training: a checkpoint is committed, the job ends with 75, and the next start ends in the adapter of a
run that nobody stopped."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_cli import SHOP, job_environment, run_job
from running_job import RunningJob, is_alive

STEPS = 40


def make_environment(folder: Path, model: Path, **settings: object) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return job_environment(
        folder,
        MODEL__ID=model,
        MODEL__DTYPE="float32",
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=folder / "slot",
        LORA__DROPOUT=0.1,
        **({"TRAIN__MAX_STEPS": STEPS} | settings),
        TRAIN__MICRO_BATCH_SIZE=2,
        TRAIN__LOSS="full",  # the longest steps, so that what happens in their midst can be met
        TRAIN__LEARNING_RATE=1e-3,
        TRAIN__LOGGING_STEPS=1,
    )


def read_adapter(folder: Path) -> bytes:
    return (folder / "slot" / "adapter_model.safetensors").read_bytes()


def committed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob("slot/checkpoint/step-*/checkpoint.json"))]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The adapter of a run that nobody stopped, for each engine and number of processes."""
    adapters: dict[tuple[str, int], bytes] = {}

    def train(engine: str, processes: int) -> bytes:
        if (engine, processes) not in adapters:
            folder = tmp_path_factory.mktemp("undisturbed") / "job"
            environment = make_environment(folder, tiny_model, PARALLEL__ENGINE=engine, PARALLEL__PROCESSES=processes)
            ended = run_job(environment)
            assert ended.code == 0, ended.output
            adapters[engine, processes] = read_adapter(folder)
        return adapters[engine, processes]

    return train


def stop(job: RunningJob, send: Callable[[], None], *, within_s: float) -> dict[str, Any]:
    """Send a signal while the job trains, and see it end with 75 in time and without a trace; return the outcome."""
    before = job.descendants()
    sent_s = time.monotonic()
    send()
    job.process.wait(timeout=within_s)
    assert time.monotonic() - sent_s < within_s
    assert job.process.returncode == 75, job.output
    while left := [process for process in {*before, *job.strays()} if is_alive(process)]:
        assert time.monotonic() - sent_s < within_s + 5, (
            f"left behind: {left}"
        )  # the kernel ends them after their parent
        time.sleep(0.05)
    outcome: dict[str, Any] = json.loads(job.log.read_text())
    assert (outcome["code"], outcome["name"]) == (75, "preempted")
    assert "Traceback" not in job.output
    return outcome


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 1), ("ddp", 2), ("zero2", 1), ("zero2", 2), ("zero3", 2)])
def test_sigterm_and_resume(
    engine: str, processes: int, tiny_model: Path, tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    folder = tmp_path / "job"
    environment = make_environment(folder, tiny_model, PARALLEL__ENGINE=engine, PARALLEL__PROCESSES=processes)
    with RunningJob(environment) as job:
        job.wait_for("step 3/")
        outcome = stop(job, lambda: job.process.send_signal(signal.SIGTERM), within_s=25)
    step = outcome["step"]
    assert 3 <= step < STEPS
    assert outcome["message"] == f"stopped by SIGTERM after step {step}"
    assert outcome["hint"] == f"start it again: it goes on from step {step}"
    [checkpoint] = committed(folder)
    assert (checkpoint["step"], checkpoint["world_size"]) == (step, processes)
    assert not (folder / "slot" / "manifest.json").exists()

    ended = run_job(environment)
    assert ended.code == 0, ended.output
    assert f"step {step}/" not in ended.output
    assert f"step {step + 1}/" in ended.output
    assert read_adapter(folder) == undisturbed(engine, processes)
    assert not (folder / "slot" / "checkpoint").exists()
    lines = [json.loads(line) for line in (folder / "slot" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("ends", ["the job is told to stop", "a worker dies"])
def test_an_evaluation_that_is_cut_short_leaves_the_adapter(ends: str, tiny_model: Path, tmp_path: Path) -> None:
    environment = make_environment(
        tmp_path, tiny_model, TRAIN__MAX_STEPS=3, PARALLEL__PROCESSES=2, EVAL__SAMPLES=4, EVAL__MAX_NEW_TOKENS=400
    )
    with RunningJob(environment) as job:
        job.wait_for("(95 % interval ")  # the answers are next
        if ends == "a worker dies":
            job.worker(1).kill()
            problem = "the evaluation failed: worker 1 of 2 died without saying why"
        else:
            job.process.send_signal(signal.SIGTERM)
            problem = "the answers to prompts: the run was told to stop before it was known"
        job.process.wait(timeout=60)
        assert job.process.returncode == 0, job.output
    manifest = json.loads((tmp_path / "slot" / "manifest.json").read_text())
    evaluation = json.loads((tmp_path / "slot" / "evaluation.json").read_text())
    assert evaluation["loss"]["loss"] == manifest["metrics"]["eval_loss"]
    assert [found.startswith(problem) for found in evaluation["problems"]] == [True], evaluation["problems"]
    assert problem.split(": ", 1)[1] in job.output
    assert not (tmp_path / "slot" / "checkpoint").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_every_process_at_once(
    processes: int, tiny_model: Path, tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    folder = tmp_path / "job"
    environment = make_environment(folder, tiny_model, PARALLEL__PROCESSES=processes)
    with RunningJob(environment) as job:
        job.wait_for("step 3/")
        everyone = [job.process.pid, *(process.pid for process in job.descendants())]
        outcome = stop(job, lambda: [os.kill(pid, signal.SIGTERM) for pid in everyone] and None, within_s=25)
    [checkpoint] = committed(folder)
    assert checkpoint["step"] == outcome["step"]
    assert run_job(environment).code == 0
    assert read_adapter(folder) == undisturbed("ddp", processes)


def test_sigterm_to_one_of_two_nodes_stops_both(
    tiny_model: Path, tmp_path: Path, undisturbed: Callable[..., bytes]
) -> None:
    def start_both() -> tuple[RunningJob, RunningJob]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {"PARALLEL__NODES": 2, "PARALLEL__HOST": "127.0.0.1", "PARALLEL__PORT": port}
        first, second = (
            make_environment(tmp_path / f"node-{rank}", tiny_model, PARALLEL__NODE_RANK=rank, **settings)
            for rank in (0, 1)
        )
        second["SFT_OUTPUT__URI"] = first["SFT_OUTPUT__URI"]
        # On some processors the number of threads changes the last bits: as many as each of two processes has.
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        mine, theirs = (",".join(map(str, some)) for some in (cores[:half], cores[-half:]))
        return RunningJob(first, "taskset", "--cpu-list", mine), RunningJob(second, "taskset", "--cpu-list", theirs)

    first, second = start_both()
    with first, second:
        first.wait_for("step 3/")
        outcome = stop(second, lambda: second.process.send_signal(signal.SIGTERM), within_s=25)
        assert first.process.wait(timeout=25) == 75, first.output
    [checkpoint] = committed(tmp_path / "node-0")
    assert (checkpoint["step"], checkpoint["world_size"]) == (outcome["step"], 2)
    told = json.loads(first.log.read_text())
    assert told["message"] == f"stopped, for another node was told to, after step {outcome['step']}"

    first, second = start_both()
    with first, second:
        assert [job.process.wait(timeout=120) for job in (first, second)] == [0, 0], first.output + second.output
    assert f"going on from step {outcome['step']} of {STEPS}" in first.output
    assert read_adapter(tmp_path / "node-0") == undisturbed("ddp", 2)


def test_a_second_signal_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "job", tiny_model, CHECKPOINT__EVERY_STEPS=2, TRAIN__MAX_STEPS=100_000)
    with RunningJob(environment) as job:
        job.wait_for("is in the store")
        job.worker(0).suspend()  # so that the first signal leads to nothing
        job.process.send_signal(signal.SIGTERM)
        job.wait_for("training stops after this step")
        outcome = stop(job, lambda: job.process.send_signal(signal.SIGTERM), within_s=5)
    assert outcome["message"] == "stopped at once by a second signal, SIGTERM"
    assert committed(tmp_path / "job")


def test_workers_that_come_to_no_end_are_ended_within_the_grace_period(tiny_model: Path, tmp_path: Path) -> None:
    environment = make_environment(
        tmp_path / "job",
        tiny_model,
        CHECKPOINT__EVERY_STEPS=2,
        RUNTIME__GRACE_SECONDS=5,
        PARALLEL__PROCESSES=2,
        TRAIN__MAX_STEPS=100_000,
    )
    with RunningJob(environment) as job:
        job.wait_for("is in the store")
        job.worker(1).suspend()
        outcome = stop(job, lambda: job.process.send_signal(signal.SIGTERM), within_s=5)
    assert outcome["message"] == "stopped by SIGTERM"
    step = committed(tmp_path / "job")[-1]["step"]
    assert outcome["hint"] == f"start it again: it goes on from step {step}"


def test_the_time_limit_stops_with_a_checkpoint_or_publishes_what_there_is(tiny_model: Path, tmp_path: Path) -> None:
    environment = make_environment(
        tmp_path / "job",
        tiny_model,
        RUNTIME__MAX_HOURS=20 / 3600,
        CHECKPOINT__EVERY_MINUTES=60,
        TRAIN__MAX_STEPS=100_000,
    )
    stopped = run_job(environment)
    assert stopped.code == 75, stopped.output
    assert stopped.outcome["message"].startswith("stopped by SFT_RUNTIME__MAX_HOURS=0.00555556 after step ")
    [checkpoint] = committed(tmp_path / "job")
    assert checkpoint["step"] == stopped.outcome["step"] > 0

    published = run_job(environment | {"SFT_TRAIN__ACCEPT_PARTIAL": "true"})
    assert published.code == 0, published.output
    manifest = json.loads((tmp_path / "job" / "slot" / "manifest.json").read_bytes())
    assert stopped.outcome["step"] < manifest["metrics"]["steps"] < 100_000
    assert "SFT_RUNTIME__MAX_HOURS" in manifest["metrics"]["stopped_by"]
    assert manifest["run_id"] == stopped.outcome["run_id"]


def test_data_that_changed_between_starts_are_another_run(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text((SHOP / "train.jsonl").read_text())
    environment = make_environment(tmp_path / "job", tiny_model) | {"SFT_DATA__URI": str(data)}
    with RunningJob(environment) as job:
        job.wait_for("step 3/")
        first = stop(job, lambda: job.process.send_signal(signal.SIGTERM), within_s=25)
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    refused = run_job(environment)
    assert refused.code == 78, refused.output
    assert f"is a checkpoint of run {first['run_id']}" in refused.outcome["message"]
    assert f"SFT_DATA__URI={data} has sha256" in refused.outcome["message"]
    assert committed(tmp_path / "job")
    given_up = run_job(environment | {"SFT_OUTPUT__OVERWRITE": "true"})
    assert given_up.code == 0, given_up.output
    assert f"a checkpoint of run {first['run_id']} gives way" in given_up.output
