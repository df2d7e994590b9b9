"""The job on real GPUs, through its command line; `make test-gpu` runs these where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from job_cli import SHOP, job_environment, run_job


def train(folder: Path, tiny_model: Path, *, on_gpu: bool = True, **settings: object) -> dict[str, Any]:
    """Train 12 steps without dropout and return the manifest, with the losses of all steps."""
    folder.mkdir()
    environment = job_environment(
        folder,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=folder / "slot",
        LORA__DROPOUT=0,
        TRAIN__MAX_STEPS=12,
        TRAIN__LEARNING_RATE=5e-3,
        **settings,
    )
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    ended = run_job(environment)
    assert ended.code == 0, ended.output
    manifest: dict[str, Any] = json.loads((folder / "slot" / "manifest.json").read_text())
    lines = (folder / "slot" / "metrics.jsonl").read_text().splitlines()
    return manifest | {"losses": [json.loads(line)["loss"] for line in lines]}


def test_every_gpu_is_used_in_the_best_precision_it_has(tiny_model: Path, tmp_path: Path) -> None:
    manifest = train(tmp_path / "run", tiny_model)
    plan = manifest["plan"]
    assert plan["device"] == "cuda"
    assert plan["processes"] == torch.cuda.device_count() == len(manifest["hardware"]["gpus"])
    assert plan["dtype"] == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16")
    assert plan["gradient_checkpointing"] is True
    assert manifest["metrics"]["eval_loss"] < manifest["metrics"]["eval_loss_base"]


def test_a_gpu_learns_what_a_cpu_learns(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"MODEL__DTYPE": "float32", "PARALLEL__PROCESSES": 1}
    on_gpu = train(tmp_path / "gpu", tiny_model, **settings)
    on_cpu = train(tmp_path / "cpu", tiny_model, on_gpu=False, **settings)
    assert on_cpu["plan"]["device"] == "cpu"
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_joined_rows_learn_what_padded_rows_learn(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    joined = train(tmp_path / "joined", tiny_model, MODEL__DTYPE=dtype, TRAIN__PACKING="true")
    padded = train(tmp_path / "padded", tiny_model, MODEL__DTYPE=dtype, TRAIN__PACKING="false")
    assert joined["losses"] == pytest.approx(padded["losses"], rel=1e-2)


def test_more_processes_than_gpus_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    processes = torch.cuda.device_count() + 1
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        PARALLEL__PROCESSES=processes,
    )
    ended = run_job(environment)
    assert ended.code == 78, ended.output
    assert f"SFT_PARALLEL__PROCESSES={processes}: only" in ended.output
