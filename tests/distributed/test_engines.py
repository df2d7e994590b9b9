"""The distributed engines through the command line: what they train beside LoRA, and that none is taken for another."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_model import TEXTS, save_bare_model
from job_cli import SHOP, job_environment, run_job
from safetensors.torch import load_file

# Runs the job, but with another engine's configuration than the plan's.
_MISLED = """
import sys
import job.launch
from job.__main__ import main

launch_command = job.launch.launch_command

def mislead(*arguments):
    command = [word.replace(sys.argv[1], sys.argv[2]) for word in launch_command(*arguments)]
    return [word for word in command if word not in sys.argv[3:]]

job.launch.launch_command = mislead
sys.exit(main(["run"]))
"""


@pytest.mark.parametrize(
    ("engine", "processes", "misled", "found"),
    [
        ("zero3", 2, ("zero3.json", "zero2.json"), "DEEPSPEED stage 2, 2 processes"),
        ("zero2", 2, ("zero2.yaml", "ddp.yaml"), "(NO|MULTI_CPU), 2 processes"),  # by Accelerate's version
    ],
)
def test_another_engine_than_the_plans_ends_the_run(
    engine: str, processes: int, misled: tuple[str, str], found: str, tiny_model: Path, tmp_path: Path
) -> None:
    environment = job_environment(
        tmp_path,
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot",
        TRAIN__MAX_STEPS=2,
        PARALLEL__ENGINE=engine,
        PARALLEL__PROCESSES=processes,
    )
    ended = subprocess.run(
        [sys.executable, "-c", _MISLED, *misled], env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 70, ended.stderr
    outcome = json.loads((tmp_path / "termination.json").read_text())
    assert outcome["message"].startswith("the plan promised ")
    assert re.search(f"; the run has {found}, cpu$", outcome["message"])
    assert not (tmp_path / "slot" / "manifest.json").exists()


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings, without chat tokens."""
    return save_bare_model(tmp_path_factory.mktemp("bare"), tied=True)


def train_embeddings(folder: Path, model: Path, **settings: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train new tokens in embeddings that are trained whole, with early stopping; return metrics and adapter."""
    folder.mkdir()
    lines = TEXTS.read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:8]))
    (folder / "eval.jsonl").write_text("\n".join(lines[-6:]))
    ended = run_job(
        job_environment(
            folder,
            MODEL__ID=model,
            MODEL__DTYPE="float32",
            MODEL__CHAT_TEMPLATE="chatml",
            DATA__URI=folder / "train.jsonl",
            DATA__EVAL_URI=folder / "eval.jsonl",
            OUTPUT__URI=folder / "slot",
            LORA__DROPOUT=0,
            LORA__MODULES_TO_SAVE="embed_tokens",
            TRAIN__MAX_STEPS=24,
            TRAIN__GLOBAL_BATCH_SIZE=8,
            TRAIN__LEARNING_RATE=2e-2,  # too high for so few rows: the held-out loss soon rises
            TRAIN__SCHEDULER="constant",
            TRAIN__WARMUP=0,
            TRAIN__EARLY_STOPPING_PATIENCE=1,
            **settings,
        )
    )
    assert ended.code == 0, ended.output
    manifest = json.loads((folder / "slot" / "manifest.json").read_text())
    assert manifest["plan"]["new_tokens"]
    return manifest["metrics"], load_file(folder / "slot" / "adapter_model.safetensors")


def test_zero3_trains_embeddings_that_have_grown_and_keeps_the_best(bare_model: Path, tmp_path: Path) -> None:
    expected_metrics, expected = train_embeddings(tmp_path / "ddp", bare_model)
    metrics, adapter = train_embeddings(tmp_path / "zero3", bare_model, PARALLEL__ENGINE="zero3", PARALLEL__PROCESSES=2)
    assert metrics["stopped_early"] is True
    assert metrics["best_step"] < metrics["steps"]
    for name in ("best_step", "steps"):
        assert metrics[name] == expected_metrics[name]
    for name in ("eval_loss_base", "eval_loss", "train_loss"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4)
    assert adapter.keys() == expected.keys()
    assert any("embed_tokens" in name for name in adapter)
    for name, weight in adapter.items():
        assert torch.allclose(weight, expected[name], atol=1e-3), name  # of steps of 2e-2
