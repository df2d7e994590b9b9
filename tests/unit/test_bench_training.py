"""What the bench of training makes of its measurements; the bench itself is run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_cli import ROOT

sys.path.append(str(ROOT / "tests" / "bench"))

from competitors import COMPETITORS, OURS, Task
from measured_run import PROBE, Measured
from training import Result, plan_task, write_report
from training_rows import Rows

from job.hardware import Hardware

HARDWARE = Hardware((), "a CPU", 2, "AMX", 2**34)
ROWS = Rows(Path("train/train.jsonl"), Path("held_out.jsonl"), [30, 40, 50, 40])
STEPS = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.SGD([weights for weights in model.parameters() if weights.requires_grad])
ids = torch.ones(2, 6, dtype=torch.long)
labels, mask = ids.clone(), ids.clone()
labels[1, 3:] = -100
mask[1, 3:] = 0
for is_training in (False, True):
    model.train(is_training)(input_ids=ids, labels=labels, attention_mask=mask)
optimizer.step()
optimizer.step()
"""


def make_measured(step_s: float, *, tokens: int = 100, computed: int = 100) -> Measured:
    steps = [
        {"time_s": 10 + step_s * n, "cpu_s": 2 * step_s * n, "tokens": tokens, "learned": 90, "computed": computed}
        for n in range(3)
    ]
    return Measured(steps, whole_s=10 * step_s, peak_bytes=2**30)


def make_task() -> Task:
    return plan_task(ROWS, Path("model"), Path("folder"), batch=2, padded_steps=1, dtype="float32")


def test_a_speed_is_that_of_all_steps_but_the_first() -> None:
    measured = make_measured(0.5)
    assert measured.training_tokens_per_s == pytest.approx(200)
    assert measured.tokens_per_cpu_s == pytest.approx(100)
    assert measured.whole_tokens_per_s == pytest.approx(60)


def test_the_probe_counts_what_is_learned_and_not_what_is_padding_or_evaluated(tmp_path: Path) -> None:
    noted = tmp_path / "steps.jsonl"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROBE), "BENCH_PROBE": str(noted)}
    subprocess.run([sys.executable, "-c", STEPS], env=environment, check=True)
    first, second = [json.loads(line) for line in noted.read_text().splitlines()]
    assert (first["computed"], first["tokens"], first["learned"]) == (12, 9, 7)
    assert (second["computed"], second["tokens"], second["learned"]) == (0, 0, 0)
    assert second["time_s"] > first["time_s"]


def test_packed_sequences_hold_what_a_step_of_the_others_does() -> None:
    task = make_task()
    assert (task.steps, task.packed_tokens, task.padded_steps) == (2, 96, 1)


def test_all_learn_from_the_same_rows_at_the_same_rate() -> None:
    task = make_task()
    for competitor in COMPETITORS:
        words = [*competitor.command(task), *competitor.settings(task).values()]
        assert any(word in ("train", "train/train.jsonl") for word in words), competitor.name
        assert "0.0002" in words, competitor.name


def test_the_report_gives_ratios_of_ours_to_each_round_by_round() -> None:
    rounds = []
    for ours_s in (1.0, 0.5):
        found = {one.name: Result(make_measured(2.0, computed=400), 1.5) for one in COMPETITORS}
        found[OURS] = Result(make_measured(ours_s), 1.25)
        rounds.append(found | {"base": Result(found[OURS].measured, 2.5)})
    page = write_report(rounds, ROWS, make_task(), HARDWARE)
    (ours,) = [line for line in page.splitlines() if f"**{OURS}**" in line]
    (other,) = [line for line in page.splitlines() if line.startswith("| trl sft, defaults")]
    assert "150 (100 to 200) tokens/s" in ours
    assert "1.2500" in ours
    assert "3.00 (2.00 to 4.00) x" in other
    assert "75%" in other  # of what it computed is padding
    assert "held-out loss is 2.5000" in page
