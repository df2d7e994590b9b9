"""Out of memory in a real run: smaller steps, the same adapter; and what was found is there after a kill.

The workers get a `sitecustomize` that raises PyTorch's own exception when an expression is true, or takes the memory
away: nothing of it is in the job.
"""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from job_cli import ROOT, SHOP, Ended, job_environment, run_job, start_job

from job.evaluation import read_evaluation
from job.manifest import hash_file

GLOBAL_BATCH = 8
STEPS = 4
SITECUSTOMIZE = """
import json, os, sys
from itertools import pairwise

if ("-m", "job.train.worker") in pairwise(sys.orig_argv):
    import resource
    import torch

    calls = 0
    embed = torch.nn.Embedding.forward
    plan = json.load(open(os.path.join(sys.orig_argv[-2], "plan.json")))
    trained = os.path.join(sys.orig_argv[-2], "trained")

    def forward(self, ids):
        global calls
        calls += torch.is_grad_enabled()  # forward passes that learn
        names = {"sequences": len(ids), "calls": calls, "rank": int(os.environ.get("RANK", 0)), "plan": plan}
        names["is_trained"] = os.path.exists(trained)
        if eval(os.environ["OUT_OF_MEMORY_WHEN"], names):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        if calls == 1 and "SPARE_MIB" in os.environ:
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * os.sysconf("SC_PAGESIZE") + int(os.environ["SPARE_MIB"]) * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return embed(self, ids)

    torch.nn.Embedding.forward = forward
"""


def environment(tiny_model: Path, folder: Path, *, when: str = "False", **settings: object) -> dict[str, str]:
    """Return the environment of a job that runs out of memory when the expression is true."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    fixed: dict[str, object] = {
        "MODEL__ID": tiny_model,
        "DATA__URI": SHOP / "train.jsonl",
        "DATA__EVAL_FRACTION": 0,
        "OUTPUT__URI": folder / "slot",
        "TRAIN__GLOBAL_BATCH_SIZE": GLOBAL_BATCH,
        "TRAIN__MAX_STEPS": STEPS,
        "TRAIN__LEARNING_RATE": 5e-3,
        "LORA__DROPOUT": 0,  # so that two processes learn what one does
        "TRAIN__PACKING": "false",  # so that a batch has one line for each sequence
    }
    result = job_environment(folder, **(fixed | settings))
    return result | {"PYTHONPATH": f"{folder}:{ROOT}", "OUT_OF_MEMORY_WHEN": when}


def published(job: Ended) -> tuple[Path, dict[str, object]]:
    """Return the slot of a job that ended well, and the plan in it; nothing but what the manifest lists is there."""
    assert job.code == 0, job.output
    slot = Path(job.outcome["output"])
    manifest = json.loads((slot / "manifest.json").read_text())
    files = {path.relative_to(slot).as_posix() for path in slot.rglob("*") if path.is_file()}
    assert files == {file["path"] for file in manifest["files"]} | {"manifest.json"}
    plan: dict[str, object] = json.loads((slot / "plan.json").read_text())
    assert manifest["plan"] == plan
    return slot, plan


def losses(slot: Path) -> list[float]:
    lines = [json.loads(line) for line in (slot / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))  # nothing of an attempt that failed
    return [line["loss"] for line in steps]


FULL = {"TRAIN__LOSS": "full"}  # all logits of a micro batch at once, which takes the most memory
EXACT = {"MODEL__DTYPE": "float32"}  # in 16 bits, sums in another order differ by more than a mistake might


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slot of a run whose micro batch was 2 from the beginning."""
    settings = FULL | EXACT | {"TRAIN__MICRO_BATCH_SIZE": 2}
    job = run_job(environment(tiny_model, tmp_path_factory.mktemp("reference"), **settings))
    return published(job)[0]


def test_smaller_steps_give_the_adapter_of_a_run_that_took_them_at_once(
    tiny_model: Path, tmp_path: Path, reference: Path
) -> None:
    when = "sequences > 4 and calls > 2 or sequences == 4 and calls > 1"  # 8: in the third step, 4: in the first
    job = run_job(environment(tiny_model, tmp_path, when=when, TRAIN__MICRO_BATCH_SIZE=8, **FULL, **EXACT))
    slot, plan = published(job)
    assert hash_file(slot / "adapter_model.safetensors") == hash_file(reference / "adapter_model.safetensors")
    assert losses(slot) == losses(reference)
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"]) == (2, 4)
    assert not plan["gradient_checkpointing"]
    sources, warnings = plan["sources"], plan["warnings"]
    assert isinstance(sources, dict)
    assert isinstance(warnings, list)
    assert sources["micro_batch_size"] == "out of memory at 4"
    first, second = warnings[-2:]
    assert first.startswith("out of memory with SFT_TRAIN__MICRO_BATCH_SIZE=8: trying 4 x 2 ")
    assert second.startswith("out of memory with micro batch=4: trying 2 x 4 ")
    assert first in job.output
    assert second in job.output
    assert "step 2/4" in job.output.split("trying 4 x 2")[0]


def test_one_rank_of_two(tiny_model: Path, tmp_path: Path, reference: Path) -> None:
    job = run_job(
        environment(
            tiny_model,
            tmp_path,
            when="rank == 1 and sequences > 2 and calls > 1",
            TRAIN__MICRO_BATCH_SIZE=4,
            PARALLEL__PROCESSES=2,
            TRAIN__LOSS="chunked",
            **EXACT,
        )
    )
    slot, plan = published(job)
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"], plan["processes"]) == (2, 2, 2)
    assert losses(slot) == pytest.approx(losses(reference), rel=1e-6)  # of one process, and with the full loss


def test_the_retry_after_a_kill_starts_with_what_was_found(tiny_model: Path, tmp_path: Path) -> None:
    job = environment(
        tiny_model,
        tmp_path,
        when="not plan['gradient_checkpointing']",
        TRAIN__MICRO_BATCH_SIZE=1,
        TRAIN__LOSS="chunked",
    )
    memory = tmp_path / "slot" / "checkpoint" / "memory.json"
    with start_job(job) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "step 1/" in line:
                os.kill(process.pid, signal.SIGKILL)
        timer.cancel()
    assert "trying gradient checkpointing" in output
    found = json.loads(memory.read_text())
    assert (found["micro_batch_size"], found["gradient_checkpointing"], found["loss"]) == (1, True, "chunked")
    assert found["device"].startswith("CPU, ")

    again = run_job(job)
    _, plan = published(again)
    assert plan["gradient_checkpointing"] == 1
    sources = plan["sources"]
    assert isinstance(sources, dict)
    assert sources["gradient_checkpointing"] == "an earlier start ran out of memory"
    assert "OutOfMemoryError" not in again.output
    assert "starting with what it found" in again.output


def test_the_end_of_the_ladder(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"TRAIN__MICRO_BATCH_SIZE": 1, "TRAIN__GRADIENT_CHECKPOINTING": "true"} | FULL
    job = run_job(environment(tiny_model, tmp_path, when="calls > 0", **settings))
    assert job.code == 71, job.output
    message, hint = job.outcome["message"], job.outcome["hint"]
    assert "a micro batch of 1, gradient checkpointing, the chunked loss" in message
    assert "Tried to allocate 7.00 GiB" in message
    assert "1 sequence of up to " in message
    assert hint.startswith("lower SFT_DATA__MAX_LENGTH (it is ")
    assert "SFT_QUANTIZATION=nf4" in hint
    assert job.output.count("== training") == 1
    assert not [path for path in (tmp_path / "slot").rglob("*") if path.is_file()]


def test_host_memory_that_really_ends(tiny_model: Path, tmp_path: Path) -> None:
    hungry = environment(tiny_model, tmp_path, TRAIN__MICRO_BATCH_SIZE=8, TRAIN__MAX_STEPS=1, **FULL)
    job = run_job(hungry | {"SPARE_MIB": "600"})
    _, plan = published(job)
    assert "out of host memory: " in job.output
    assert plan["micro_batch_size"] < 8  # type: ignore[operator]


MEASURED: dict[str, object] = {
    "DATA__EVAL_URI": SHOP / "eval.jsonl",
    "DATA__EVAL_FRACTION": "",  # which the other tests set
    "EVAL__SAMPLES": 3,
    "EVAL__MAX_NEW_TOKENS": 4,
    "TRAIN__MICRO_BATCH_SIZE": 2,
}


def test_one_rank_of_two_while_the_adapter_is_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    whole, _ = published(run_job(environment(tiny_model, tmp_path / "whole", **MEASURED)))
    expected = read_evaluation(whole / "evaluation.json")
    when = "is_trained and rank == 1 and sequences > 1"
    job = run_job(environment(tiny_model, tmp_path / "one", when=when, PARALLEL__PROCESSES=2, **MEASURED))
    slot, plan = published(job)
    assert (plan["micro_batch_size"], plan["processes"]) == (2, 2)  # nothing was trained again
    assert "out of memory while computing the held-out loss: one at a time" in job.output
    found = read_evaluation(slot / "evaluation.json")
    assert (found.problems, found.samples) == ([], expected.samples)
    assert [row.line for row in found.rows] == [row.line for row in expected.rows]
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in expected.rows], rel=1e-4)


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ("ddp", "the loss on single rows: out of memory, even for one at a time"),
        ("zero3", "the evaluation failed: out of GPU memory: CUDA out of memory. Tried to allocate 7.00 GiB"),
    ],
)
def test_no_memory_for_an_evaluation_costs_its_figures_only(
    engine: str, problem: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings = MEASURED | {"PARALLEL__PROCESSES": 2, "PARALLEL__ENGINE": engine}
    job = run_job(environment(tiny_model, tmp_path / "run", when="is_trained and rank == 1", **settings))
    slot, _ = published(job)
    found = read_evaluation(slot / "evaluation.json")
    assert found.loss is None
    assert found.problems[0] == problem
    metrics = json.loads((slot / "manifest.json").read_text())["metrics"]
    assert "eval_loss_base" in metrics
    assert "eval_loss" not in metrics
    assert job.output.count("== training") == 1
