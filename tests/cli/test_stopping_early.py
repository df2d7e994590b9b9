"""Early stopping through the command line: two processes stop at the same step, and the best adapter is published."""

import json
from pathlib import Path

import pytest
from job_cli import job_environment, run_job

WORDS = ["red", "green", "blue", "black", "white", "pink", "grey", "gold"]


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": asked, "completion": answer}) + "\n" for asked, answer in pairs))
    return path


def test_two_processes_stop_together_and_the_best_adapter_is_published(tiny_model: Path, tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    # Colours that are learned by heart, and held out with other numbers: soon the better the worse.
    train = [(f"{word} {number}", WORDS[(place + number) % 8]) for place, word in enumerate(WORDS) for number in (1, 4)]
    evaluation = [(f"{word} {number}", WORDS[(place * 3) % 8]) for place, word in enumerate(WORDS) for number in (2, 3)]
    ended = run_job(
        job_environment(
            tmp_path,
            MODEL__ID=tiny_model,
            MODEL__DTYPE="float32",
            DATA__URI=write_pairs(tmp_path / "train.jsonl", train),
            DATA__EVAL_URI=write_pairs(tmp_path / "eval.jsonl", evaluation),
            OUTPUT__URI=slot,
            TRAIN__EPOCHS=100,
            TRAIN__LEARNING_RATE=2e-2,
            TRAIN__SCHEDULER="constant",
            TRAIN__EARLY_STOPPING_PATIENCE=2,
            PARALLEL__PROCESSES=2,
        )
    )
    assert ended.code == 0, ended.output
    manifest = json.loads((slot / "manifest.json").read_text())
    metrics, plan = manifest["metrics"], manifest["plan"]
    records = [json.loads(line) for line in (slot / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert plan["processes"] == 2
    assert metrics["stopped_early"]
    assert metrics["steps"] == max(losses) < plan["steps"]
    assert metrics["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(losses[metrics["best_step"]], rel=1e-6)
    assert losses[metrics["steps"]] > metrics["eval_loss"]
    assert ended.outcome["step"] == metrics["steps"]
    assert f"the held-out loss has not fallen since step {metrics['best_step']}" in ended.output
