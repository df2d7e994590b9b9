"""A run on a GPU that is killed goes on where it was, with what only GPUs have: precisions, engines, an optimizer."""

import json
from pathlib import Path

import pytest
from job_cli import SHOP, job_environment, run_job
from running_job import RunningJob

STEPS = 12
SAVED = 4


@pytest.mark.parametrize(
    "settings",
    [
        {"MODEL__DTYPE": "bfloat16"},
        {"MODEL__DTYPE": "float16"},
        {"TRAIN__OPTIMIZER": "paged_adamw_8bit"},
        {"PARALLEL__ENGINE": "zero2", "MODEL__DTYPE": "float16"},
        {"PARALLEL__ENGINE": "zero3", "PARALLEL__OFFLOAD": "true"},
        {"PARALLEL__ENGINE": "fsdp2"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_it_goes_on_where_it_was(settings: dict[str, str], small_model: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        environment = job_environment(
            tmp_path / name,
            MODEL__ID=small_model,
            DATA__URI=SHOP / "train.jsonl",
            OUTPUT__URI=tmp_path / name / "slot",
            LORA__DROPOUT=0.1,
            TRAIN__MAX_STEPS=STEPS,
            TRAIN__LEARNING_RATE=5e-3,
            CHECKPOINT__EVERY_STEPS=SAVED,
            PARALLEL__PROCESSES=1,
            **settings,
        )
        if name == "killed":
            with RunningJob(environment) as job:
                job.wait_for(f"checkpoint of step {SAVED} is in the store")
                job.process.kill()
                job.process.wait()
        ended = run_job(environment)
        assert ended.code == 0, ended.output
        assert ("going on from step" in ended.output) == (name == "killed")
        assert "not to the last bit" not in ended.output
        lines = (tmp_path / name / "slot" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert len(losses["whole"]) == STEPS
    # Kernels for attention may sum in another order each time; what is lost or drawn anew would differ by far more.
    assert losses["killed"] == pytest.approx(losses["whole"], rel=1e-3)
