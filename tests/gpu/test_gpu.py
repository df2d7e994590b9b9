"""The job on real GPUs, through its command line; `make test-gpu` runs these where there is one."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_model import save_bare_model
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


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_learn_on_a_gpu_what_they_learn_on_a_cpu(tmp_path: Path, tied: bool) -> None:
    model = save_bare_model(tmp_path / "model", tied=tied)
    settings = {"MODEL__CHAT_TEMPLATE": "chatml", "MODEL__DTYPE": "float32", "PARALLEL__PROCESSES": 1}
    on_gpu = train(tmp_path / "gpu", model, **settings)
    on_cpu = train(tmp_path / "cpu", model, on_gpu=False, **settings)
    assert on_gpu["plan"]["new_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert on_gpu["losses"] == pytest.approx(on_cpu["losses"], rel=1e-3)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_paged_optimizer_learns_what_the_plain_one_learns(tiny_model: Path, tmp_path: Path) -> None:
    paged = train(tmp_path / "paged", tiny_model, TRAIN__OPTIMIZER="paged_adamw_8bit")
    plain = train(tmp_path / "plain", tiny_model, TRAIN__OPTIMIZER="adamw")
    assert paged["losses"] == pytest.approx(plain["losses"], rel=3e-2)


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
