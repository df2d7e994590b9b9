"""Hangs through the real command line: what stands still is ended and shown, what is slow or frozen is not.

The workers get a `sitecustomize` that sleeps in a micro batch for as long as an expression says: nothing of it is in
the job.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from job_cli import ROOT, SHOP, job_environment, run_job
from running_job import RunningJob, is_alive

LIMIT_S = 6.0
ENDS_WITHIN_S = 20.0  # after the limit
DAWDLING = "3 if rank == 1 and calls > 3 else 0"  # so that rank 1 is stopped in a forward pass
# Before a step the ranks count their tokens; in it DDP broadcasts the buffers and averages the gradients; after it all
# agree on what to do next.
COLLECTIVES = ("in all_gather", "in _distributed_broadcast_coalesced", "in _engine_run_backward", "in all_reduce")
SITECUSTOMIZE = """
import os, sys, time
from datetime import timedelta
from itertools import pairwise

if ("-m", "job.train.worker") in pairwise(sys.orig_argv):
    import torch

    calls = 0
    embed = torch.nn.Embedding.forward
    init_process_group = torch.distributed.init_process_group

    def forward(self, ids):
        global calls
        calls += torch.is_grad_enabled()  # micro batches that are learned from
        if torch.is_grad_enabled():
            time.sleep(eval(os.environ["SLEEP_S"], {"calls": calls, "rank": int(os.environ.get("RANK", 0))}))
        return embed(self, ids)

    def init_impatiently(*args, **kwargs):
        timeout = {"timeout": timedelta(seconds=float(os.environ["TIMEOUT_S"]))}
        return init_process_group(*args, **(kwargs | timeout))

    torch.nn.Embedding.forward = forward
    if "TIMEOUT_S" in os.environ:
        torch.distributed.init_process_group = init_impatiently
"""


def environment(model: Path, folder: Path, *, sleep_s: str = "0", **settings: object) -> dict[str, str]:
    """Return the environment of a job that trains for hours, unless told otherwise, and sleeps in each micro batch."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    fixed: dict[str, object] = {
        "MODEL__ID": model,
        "DATA__URI": SHOP / "train.jsonl",
        "DATA__EVAL_FRACTION": 0,
        "OUTPUT__URI": folder / "slot",
        "TRAIN__MAX_STEPS": 100_000,
        "TRAIN__LOGGING_STEPS": 1,
        "RUNTIME__HANG_MINUTES": LIMIT_S / 60,
    }
    result = job_environment(folder, **(fixed | settings))
    return result | {"PYTHONPATH": f"{folder}:{ROOT}", "SLEEP_S": sleep_s}


@contextmanager
def ends_soon(*jobs: RunningJob) -> Iterator[list[dict[str, Any]]]:
    """See jobs end soon after what hangs them in this block, with nothing left of them; yield their outcomes."""
    outcomes: list[dict[str, Any]] = []
    started = [process for job in jobs for process in job.descendants()]
    yield outcomes
    hung_s = time.monotonic()
    for job in jobs:
        job.process.wait(timeout=LIMIT_S + ENDS_WITHIN_S - (time.monotonic() - hung_s))
        outcomes.append(json.loads(job.log.read_text()))
    assert [process for process in started if is_alive(process)] == []
    assert [process for job in jobs for process in job.strays() if is_alive(process)] == []


def stacks_of(rank: int, output: str) -> str:
    """Return the stacks of a rank in a job's log."""
    return output.split(f"the threads of rank {rank}, ")[1].split(" error: ", maxsplit=1)[0]


def innermost_call(stacks: str) -> str:
    """Return where the main thread is."""
    return stacks.splitlines()[2]


def test_a_rank_that_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    with RunningJob(environment(tiny_model, tmp_path, sleep_s=DAWDLING, PARALLEL__PROCESSES=2)) as job:
        job.wait_for("step 3/")
        with ends_soon(job) as outcomes:
            job.worker(1).suspend()
        [outcome] = outcomes
        assert (job.process.returncode, outcome["code"]) == (70, 70), job.output
        assert "rank 1 has finished no micro batch for " in outcome["message"]
        assert f": stopped in step {outcome['step'] + 1} " in outcome["message"]
        assert "(its process is stopped), and rank 0 waits for it" in outcome["message"]
        assert "SFT_RUNTIME__HANG_MINUTES" in outcome["hint"]
        assert any(call in innermost_call(stacks_of(0, job.output)) for call in COLLECTIVES), job.output
        assert outcome["message"] in job.output
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_step_that_never_ends(tiny_model: Path, tmp_path: Path) -> None:
    with RunningJob(environment(tiny_model, tmp_path, sleep_s="1e6 if calls > 2 else 0")) as job:
        job.wait_for("step 2/")
        with ends_soon(job) as outcomes:
            pass
        [outcome] = outcomes
        assert (job.process.returncode, outcome["code"], outcome["step"]) == (70, 70, 2), job.output
        assert "rank 0 has finished no micro batch for " in outcome["message"]
        assert outcome["message"].endswith(": stopped in step 3")
        assert "sitecustomize.py" in innermost_call(stacks_of(0, job.output))


def test_one_of_two_nodes(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"PARALLEL__NODES": 2, "PARALLEL__HOST": "127.0.0.1", "PARALLEL__PORT": port}
    settings["OUTPUT__URI"] = tmp_path / "slot"
    nodes = [
        environment(tiny_model, tmp_path / f"node-{rank}", sleep_s=DAWDLING, PARALLEL__NODE_RANK=rank, **settings)
        for rank in (0, 1)
    ]
    with RunningJob(nodes[0]) as first, RunningJob(nodes[1]) as second:
        first.wait_for("step 3/")
        with ends_soon(first, second) as outcomes:
            second.worker(1).suspend()
        assert [job.process.returncode for job in (first, second)] == [69, 69], first.output + second.output
        for outcome in outcomes:
            assert " has finished no micro batch for " in outcome["message"]
            assert outcome["hint"]
        assert "rank 1 " in outcomes[1]["message"]
        assert "its process is stopped" in outcomes[1]["message"]
        assert any(call in innermost_call(stacks_of(0, first.output)) for call in COLLECTIVES), first.output


def test_slow_micro_batches_are_no_hang_and_no_lost_peer(tiny_model: Path, tmp_path: Path) -> None:
    """A step takes longer than the limit, and one rank longer than PyTorch's own limit for the other to wait."""
    slow = environment(
        tiny_model,
        tmp_path,
        sleep_s="8 if rank == 1 else 0",
        PARALLEL__PROCESSES=2,
        RUNTIME__HANG_MINUTES=12 / 60,
        TRAIN__MAX_STEPS=1,
        TRAIN__GLOBAL_BATCH_SIZE=4,
        TRAIN__MICRO_BATCH_SIZE=1,
    )
    started_s = time.monotonic()
    job = run_job(slow | {"TIMEOUT_S": "5"})
    assert time.monotonic() - started_s > 16
    assert job.code == 0, job.output


def test_a_frozen_machine_and_a_launcher_that_never_ends(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"PARALLEL__PROCESSES": 2, "TRAIN__MAX_STEPS": 12}
    with RunningJob(environment(tiny_model, tmp_path, sleep_s="0.5", **settings)) as job:
        job.wait_for("step 3/")
        frozen = [psutil.Process(job.process.pid), *job.descendants()]
        for process in frozen:
            process.suspend()
        time.sleep(LIMIT_S + 3)
        launcher = job.launcher()
        for process in frozen:
            if process != launcher:  # it stays so, and doesn't see its workers end
                process.resume()
        assert job.process.wait(timeout=60) == 0, job.output
        assert "finished no micro batch" not in job.output
        assert "the workers have ended their work, but not their processes" in job.output
        assert [process for process in frozen if is_alive(process)] == []
    assert (tmp_path / "slot" / "manifest.json").exists()
