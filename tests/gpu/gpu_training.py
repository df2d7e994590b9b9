"""Trains small models on a GPU by the job's command line, and reads what was published."""

import json
from pathlib import Path
from typing import Any

from job_cli import SHOP, Ended, job_environment, run_job


def train(folder: Path, model: Path, *, on_gpu: bool = True, **settings: object) -> dict[str, Any]:
    """Train on the shop's rows, 12 steps without dropout, and return the manifest, with the losses of all steps."""
    ended = try_to_train(folder, model, on_gpu=on_gpu, **settings)
    assert ended.code == 0, ended.output
    return read_slot(folder / "slot") | {"output": ended.output}


def try_to_train(
    folder: Path, model: Path, *, on_gpu: bool = True, environment: dict[str, str] | None = None, **settings: object
) -> Ended:
    """Run the job, and return how it ended."""
    folder.mkdir()
    defaults = {
        "MODEL__ID": model,
        "DATA__URI": SHOP / "train.jsonl",
        "OUTPUT__URI": folder / "slot",
        "LORA__DROPOUT": 0,
        "TRAIN__MAX_STEPS": 12,
        "TRAIN__LEARNING_RATE": 5e-3,
        "PARALLEL__PROCESSES": 1,
    }
    variables = job_environment(folder, **(defaults | settings)) | (environment or {})
    if not on_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return run_job(variables)


def read_slot(slot: Path) -> dict[str, Any]:
    """Return a slot's manifest, with the losses of all steps."""
    manifest: dict[str, Any] = json.loads((slot / "manifest.json").read_text())
    lines = [json.loads(line) for line in (slot / "metrics.jsonl").read_text().splitlines()]
    return manifest | {"losses": [line["loss"] for line in lines if "loss" in line]}
