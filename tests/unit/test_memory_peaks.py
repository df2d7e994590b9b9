"""The memory estimate against the peaks of real training on this CPU, one thing varied at a time.

`pytest -s` prints estimate, peak and error of each.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured_training import measure_peaks, save_llama

from job.log import format_bytes
from job.memory.estimate import overhead_bytes
from job.memory.model_shape import read_model_shape
from job.plan import TrainPlan

PlanFor = Callable[..., TrainPlan]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8_000,
    "max_position_embeddings": 1024,
}
# The first training in a process loads what the others find there, kernels for bfloat16 included.
WARM_UP: dict[str, Any] = {"length": 16, "TRAIN__MICRO_BATCH_SIZE": 1, "MODEL__DTYPE": "bfloat16"}
# name -> what differs from the base case: tokens of a row, sizes of the model, settings
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "checkpointing": {"TRAIN__GRADIENT_CHECKPOINTING": "true"},
    "micro batch 1": {"TRAIN__MICRO_BATCH_SIZE": 1},
    "rows of 512": {"length": 512, "TRAIN__MICRO_BATCH_SIZE": 2},
    "vocabulary of 50k": {"vocab_size": 50_000},
    "10 layers": {"num_hidden_layers": 10},
    "10 layers, checkpointing": {"num_hidden_layers": 10, "TRAIN__GRADIENT_CHECKPOINTING": "true"},
    "10 layers, half of them": {"num_hidden_layers": 10, "TRAIN__GRADIENT_CHECKPOINTING": 0.5},
    "padded": {"TRAIN__PACKING": "false"},
    "eager": {"MODEL__ATTN_IMPLEMENTATION": "eager", "TRAIN__PACKING": "false"},
    "two targets": {"LORA__TARGET_MODULES": "q_proj,v_proj"},
    "no dropout": {"LORA__DROPOUT": 0},
    "rank 256": {"LORA__R": 256},
    "embeddings trained": {"LORA__MODULES_TO_SAVE": "embed_tokens", "vocab_size": 50_000},
}
# Compared as a whole: its kernels take some 30 MiB once, whatever the sizes, which are no part of the model.
BFLOAT16: dict[str, dict[str, Any]] = {
    "bfloat16": {"MODEL__DTYPE": "bfloat16", "TRAIN__MICRO_BATCH_SIZE": 1},
    "bfloat16, short rows": {
        "MODEL__DTYPE": "bfloat16",
        "TRAIN__MICRO_BATCH_SIZE": 16,
        "length": 128,
        "num_hidden_layers": 8,
    },
}
DEFAULTS: dict[str, object] = {
    "TRAIN__MICRO_BATCH_SIZE": 4,
    "TRAIN__GRADIENT_CHECKPOINTING": "false",
    "TRAIN__LOSS": "full",
    "TRAIN__MAX_STEPS": 2,
}


def make_case(plan_for: PlanFor, case: dict[str, Any], folder: Path) -> tuple[TrainPlan, Path]:
    """Return the plan of a case, and its model."""
    sizes = SIZES | {name: value for name, value in case.items() if name in SIZES}
    settings = DEFAULTS | {name: value for name, value in case.items() if name.isupper()}
    model = folder / "-".join(str(size) for size in sizes.values())
    if not model.exists():
        save_llama(model, **sizes)
    stored_bytes = (model / "model.safetensors").stat().st_size
    shape = read_model_shape(json.loads((model / "config.json").read_text()), stored_bytes)
    data = {"train_rows": 16, "eval_rows": 0, "max_length_tokens": case.get("length", 256), "shape": shape}
    batch = settings["TRAIN__MICRO_BATCH_SIZE"]
    return plan_for({"cores": 2}, data, TRAIN__GLOBAL_BATCH_SIZE=batch, **settings), model


def test_each_part_is_what_training_needs(plan_for: PlanFor, tmp_path: Path) -> None:
    """Of tensors alone, without the process's own memory and the heap's fragments."""
    cases = [make_case(plan_for, case, tmp_path) for case in (WARM_UP, *CASES.values())]
    peaks = measure_peaks(cases, tmp_path / "runs", with_fragments=False)
    errors = {}
    for name, (plan, _), peak in zip(CASES, cases[1:], peaks[1:], strict=True):
        memory = plan.memory
        estimated = memory.total_bytes - memory.overhead_bytes - memory.fragments_bytes
        measured = peak.peak_bytes - peak.before_bytes
        errors[name] = estimated / measured - 1
        print(f"{name:24} {format_bytes(measured):>10} {format_bytes(estimated):>10} {errors[name]:+7.1%}")
    assert {name: error for name, error in errors.items() if not -0.1 < error < 0.1} == {}


def test_the_whole_is_what_a_process_needs(plan_for: PlanFor, tmp_path: Path) -> None:
    names = ("base", "checkpointing", "10 layers", "10 layers, checkpointing", "10 layers, half of them")
    chosen = {name: CASES[name] for name in names}
    chosen |= BFLOAT16
    cases = [make_case(plan_for, case, tmp_path) for case in (WARM_UP, *chosen.values())]
    peaks = measure_peaks(cases, tmp_path / "runs", with_fragments=True)
    errors = {}
    for name, (plan, _), peak in zip(chosen, cases[1:], peaks[1:], strict=True):
        measured = peak.peak_bytes - peak.before_bytes + overhead_bytes("cpu", 1)
        errors[name] = plan.memory.total_bytes / measured - 1
        print(f"{name:24} {format_bytes(measured):>10} {errors[name]:+7.1%}  {plan.memory.describe()}")
    assert {name: error for name, error in errors.items() if not -0.1 < error < 0.25} == {}
