"""However a global batch is split - into micro batches, among processes, by which engine, joined or padded -, the run
learns the same: one course of losses and gradient norms, one adapter; and it measures the same, row by row, and answers
the same.

What could tell the ways apart is all here: answers of different lengths, clipping that bites at every step, a warmup,
rows that are no multiple of the global batch, held-out rows that are no multiple of the processes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from job_cli import SHOP, job_environment, run_job
from safetensors.torch import load_file

from job.evaluation import Evaluation, read_evaluation

GLOBAL_BATCH = 8
ROWS = 21  # 2 passes are 6 steps, whose last batch holds the first rows of a third pass
HELD_OUT_ROWS = 5
MAX_GRAD_NORM = 0.05  # of norms around 0.2

# How far float32 arithmetic in another order may lead apart. Losses are 10.7; weights go up to 0.14, steps to 5e-3.
TOLERANCES = {
    "step": 0,
    "epoch": 0,
    "tokens": 0,
    "learning_rate": 1e-9,
    "loss": 1e-5,
    "eval_loss": 1e-5,
    "eval_loss_base": 1e-5,
    "grad_norm": 1e-5,
}
WEIGHT_TOLERANCE = 2e-5
ROW_TOLERANCE = 1e-4  # of a row's mean loss; few tokens average out less

SPLITS = [  # engine, processes, micro batch size, gradient accumulation steps, packing
    ("ddp", 1, 4, 2, "true"),
    ("ddp", 1, 2, 4, "false"),
    ("ddp", 2, 1, 4, "true"),
    ("ddp", 2, 4, 1, "false"),
    ("zero2", 1, 4, 2, "false"),
    ("zero2", 2, 2, 2, "true"),
    ("zero3", 1, 1, 8, "true"),
    ("zero3", 2, 1, 4, "false"),
    ("zero3", 2, 4, 1, "true"),
]


def train(
    folder: Path, model: Path, *, engine: str, processes: int, micro: int, packing: str
) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, torch.Tensor], Evaluation]:
    """Train, and return plan, metrics, adapter and evaluation."""
    folder.mkdir()
    for name, rows in (("train", ROWS), ("eval", HELD_OUT_ROWS)):
        lines = (SHOP / f"{name}.jsonl").read_text().splitlines()[:rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    ended = run_job(
        job_environment(
            folder,
            MODEL__ID=model,
            MODEL__DTYPE="float32",
            DATA__URI=folder / "train.jsonl",
            DATA__EVAL_URI=folder / "eval.jsonl",
            OUTPUT__URI=folder / "slot",
            LORA__DROPOUT=0,
            TRAIN__EPOCHS=2,
            TRAIN__WARMUP=2,
            TRAIN__LEARNING_RATE=5e-3,
            TRAIN__MAX_GRAD_NORM=MAX_GRAD_NORM,
            TRAIN__GLOBAL_BATCH_SIZE=GLOBAL_BATCH,
            TRAIN__MICRO_BATCH_SIZE=micro,
            TRAIN__PACKING=packing,
            TRAIN__LOGGING_STEPS=1,
            PARALLEL__ENGINE=engine,
            PARALLEL__PROCESSES=processes,
            EVAL__SAMPLES=3,
            EVAL__MAX_NEW_TOKENS=4,
        )
    )
    assert ended.code == 0, ended.output
    slot = folder / "slot"
    plan = json.loads((slot / "plan.json").read_text())
    lines = [json.loads(line) for line in (slot / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if "loss" in line]
    manifest = json.loads((slot / "manifest.json").read_text())
    metrics.append({name: manifest["metrics"][name] for name in ("eval_loss_base", "eval_loss")})
    return plan, metrics, load_file(slot / "adapter_model.safetensors"), read_evaluation(slot / "evaluation.json")


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """The run whose every step is one forward pass of the global batch, padded."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    plan, metrics, adapter, evaluation = train(
        folder, tiny_model, engine="ddp", processes=1, micro=GLOBAL_BATCH, packing="false"
    )
    assert plan["gradient_accumulation_steps"] == 1
    assert plan["steps"] * GLOBAL_BATCH > 2 * ROWS
    assert plan["warmup_steps"] == 2
    assert all(record["grad_norm"] > 2 * MAX_GRAD_NORM for record in metrics[:-1])
    assert len(evaluation.rows) == HELD_OUT_ROWS
    assert len(evaluation.samples) == 3
    assert any(sample.before != sample.after for sample in evaluation.samples)
    return plan, metrics, adapter, evaluation


@pytest.mark.parametrize(("engine", "processes", "micro", "accumulation", "packing"), SPLITS)
def test_every_split_learns_the_same(
    engine: str,
    processes: int,
    micro: int,
    accumulation: int,
    packing: str,
    reference: tuple[Any, Any, Any, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    _, expected_metrics, expected, expected_evaluation = reference
    plan, metrics, adapter, evaluation = train(
        tmp_path / "run", tiny_model, engine=engine, processes=processes, micro=micro, packing=packing
    )
    assert (plan["engine"], plan["processes"], plan["gradient_accumulation_steps"]) == (engine, processes, accumulation)
    for record, other in zip(metrics, expected_metrics, strict=True):
        assert record.keys() == other.keys()
        for name, tolerance in TOLERANCES.items():
            if name in other:
                assert record[name] == pytest.approx(other[name], abs=tolerance), (name, record, other)
    assert (evaluation.problems, evaluation.samples) == ([], expected_evaluation.samples)
    for row, other in zip(evaluation.rows, expected_evaluation.rows, strict=True):
        assert (row.line, row.supervised_tokens) == (other.line, other.supervised_tokens)
        assert row.loss_base == pytest.approx(other.loss_base, abs=ROW_TOLERANCE)
        assert row.loss == pytest.approx(other.loss, abs=ROW_TOLERANCE)
    assert adapter.keys() == expected.keys()
    difference = max((weight - expected[name]).abs().max().item() for name, weight in adapter.items())
    assert difference < WEIGHT_TOLERANCE
