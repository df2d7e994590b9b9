"""One measurement of `make bench-gpu`: some steps by the job's own worker, on a random model, as some settings say.

It is asked for, and answers, as JSON, so that each can run in a process of its own: what one leaves in the GPU's memory
is no part of the next. Heavy imports are inside of functions, for a command that only says that there is no GPU.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

PLAIN_NORMS = "plain norms"  # transformers' own modules for them
COMPILED = "compiled"  # rotary embeddings and gated MLPs; "true" for a run of any length
WARMUP_STEPS = 3  # kernels are chosen and compiled in them

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Task:
    """What to measure: `settings` are the job's, without their prefix, and PLAIN_NORMS and COMPILED, which the job has
    no setting for; rows have these lengths, in turn, and a micro batch has `rows_of_batch` of them."""

    model: str
    lengths: list[int]
    rows_of_batch: int
    steps: int
    settings: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """What came of it: useful tokens (no padding) a second in the median step, and the model's parameters; or what
    kept it from running."""

    tokens_per_s: float = 0.0
    peak_bytes: int = 0
    loss: float = 0.0
    parameters: int = 0
    lacking: str | None = None
    out_of_memory: bool = False


def make_model(shape: str, folder: Path, device: str) -> Path:
    """Save a model of random weights, unless it is there: built on the device, in bfloat16, some 16 GB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target = folder / shape
    if (target / "config.json").is_file():
        return target
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    return target


def measure(task: Task) -> Measured:
    """Train as the task says, in this process."""
    import torch

    from job.errors import ConfigError
    from job.train.out_of_memory import describe_shortage

    is_compiled = task.settings.get(COMPILED) == "true"
    with tempfile.TemporaryDirectory(prefix="sft-job-bench-") as name, ExitStack() as patches:
        patches.enter_context(mock.patch("job.train.model.is_worth_compiling", return_value=is_compiled))
        patches.enter_context(mock.patch("job.train.model.compile_elementwise", _compile_or_refuse))
        if task.settings.get(PLAIN_NORMS) == "true":
            patches.enter_context(mock.patch("job.train.model.fuse_norms"))
        try:
            return _train(task, Path(name))
        except ConfigError as refusal:
            return Measured(lacking=refusal.message)
        except (RuntimeError, MemoryError, torch.OutOfMemoryError) as error:
            if (shortage := describe_shortage(error)) is None:
                raise
            return Measured(lacking=shortage, out_of_memory=True)


def _compile_or_refuse(*model: Any) -> None:
    """Compile as the job does; what it only warns of would make a rung tell of what is not there."""
    from job.errors import ConfigError
    from job.train.elementwise import compile_elementwise

    done = compile_elementwise(*model)
    if done != ["rotary embeddings", "gated MLPs"]:
        raise ConfigError(f"of rotary embeddings and gated MLPs only {done} compile here", hint="see the log")


def _train(task: Task, root: Path) -> Measured:
    import accelerate

    from job.handover import RunFolder
    from job.train.heartbeat import Pulse
    from job.train.run import train

    folder = RunFolder(root)
    folder.adapter.mkdir()
    plan = _plan(task)
    inputs = _write_inputs(task, folder, plan)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    train(plan, inputs, folder, rank=0, remember_step=lambda _: None, pulse=Pulse(folder, rank=0))
    steps = [line for line in folder.read_metrics() if "loss" in line]
    result = folder.read_result()
    step_tokens = task.rows_of_batch // len(task.lengths) * sum(task.lengths)
    return Measured(
        tokens_per_s=step_tokens / statistics.median(step["step_s"] for step in steps[WARMUP_STEPS:]),
        peak_bytes=result["peak_memory_bytes"],
        loss=steps[-1]["loss"],
        parameters=result["total_parameters"] - result["trainable_parameters"],
    )


def _plan(task: Task) -> Any:
    """Plan as the job does, by its settings and this machine; refuses what it refuses."""
    from job.hardware import find_hardware
    from job.memory.model_shape import read_model_shape
    from job.parallel import plan_parallel
    from job.plan import DataFacts, make_plan
    from job.settings import load_settings

    rows = task.steps * task.rows_of_batch
    settings = {
        "MODEL__ID": task.model,
        "DATA__URI": task.model,
        "OUTPUT__URI": task.model,
        "LORA__R": "16",
        "LORA__DROPOUT": "0",
        "PARALLEL__PROCESSES": "1",
        "TRAIN__MAX_STEPS": str(task.steps),
        "TRAIN__WARMUP": "0",
        "TRAIN__LOGGING_STEPS": "1",
        "TRAIN__GLOBAL_BATCH_SIZE": str(task.rows_of_batch),
        "TRAIN__MICRO_BATCH_SIZE": str(task.rows_of_batch),
    }
    for name in [name for name in os.environ if name.startswith("SFT_")]:
        del os.environ[name]
    given = {name: value for name, value in task.settings.items() if name not in (PLAIN_NORMS, COMPILED)}
    os.environ |= {f"SFT_{name}": value for name, value in (settings | given).items()}
    loaded = load_settings()
    config = json.loads((Path(task.model) / "config.json").read_bytes())
    stored = sum(file.stat().st_size for file in Path(task.model).glob("*.safetensors"))
    tokens = rows * sum(task.lengths) // len(task.lengths)
    facts = DataFacts(
        model_revision="random",
        model_type=config["model_type"],
        shape=read_model_shape(config, stored_bytes=stored),
        chat_template="none",
        max_length_tokens=max(task.lengths),
        max_length_source="bench",
        truncation="drop",
        train_rows=rows,
        eval_rows=0,
        train_tokens=tokens,
        supervised_tokens=tokens,
    )
    return make_plan(loaded, plan_parallel(loaded, find_hardware()), facts)


def _write_inputs(task: Task, folder: Any, plan: Any) -> Any:
    """Write random rows, all supervised, in the order in which training takes them; so every batch is as long."""
    import numpy as np
    import pyarrow as pa

    from job.handover import WorkerInputs
    from job.train.dataset import StreamSampler

    generator = np.random.default_rng(0)
    order = list(StreamSampler(plan.train_rows, steps=plan.steps, global_batch_size=task.rows_of_batch, seed=plan.seed))
    lengths = [0] * plan.train_rows
    for turn, index in enumerate(order):
        lengths[index] = task.lengths[turn % len(task.lengths)]
    rows = [generator.integers(2, 500, length).tolist() for length in lengths]
    tokens = pa.list_(pa.int32())
    places = {"file": pa.array([0] * len(rows), pa.int32()), "line": pa.array(range(1, len(rows) + 1), pa.int64())}
    table = pa.table({"input_ids": pa.array(rows, tokens), "labels": pa.array(rows, tokens)} | places)
    with pa.ipc.new_file(str(folder.root / "tokens.arrow"), table.schema) as writer:
        writer.write_table(table)
    segments = np.column_stack([np.arange(len(rows)), np.zeros(len(rows)), lengths]).astype(np.int64)
    np.save(folder.train_rows, segments)
    np.save(folder.eval_rows, segments[:0])
    return WorkerInputs(
        model_folder=Path(task.model),
        train_tokens=folder.root / "tokens.arrow",
        train_names=["random"],
        eval_tokens=None,
        eval_names=[],
        pad_token_id=1,
        vocabulary_size=0,
        new_tokens=[],
        log_format="json",
        log_level="warning",
    )


def measure_peak_flops(device: str, kind: str, size: int) -> float | None:
    """Return the floating-point operations a second of this device in a product of square matrices, the best of some;
    `kind` is bfloat16, float32 or fp8, which has none on a CPU."""
    import torch

    from job.train.fp8 import quantize_rows

    if kind == "fp8" and (device == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        return None
    left, right = (torch.randn(size, size, device=device) for _ in range(2))

    def multiply() -> None:
        if kind == "fp8":
            torch._scaled_mm(
                *(a, b.T), scale_a=a_scales, scale_b=b_scales.T, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            a @ b

    if kind == "fp8":
        (a, a_scales), (b, b_scales) = quantize_rows(left), quantize_rows(right)
    else:
        a, b = (matrix.to(getattr(torch, kind)) for matrix in (left, right))
    best_s = float("inf")
    for _ in range(10):
        began_s = time.perf_counter()
        for _ in range(10):
            multiply()
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, (time.perf_counter() - began_s) / 10)
    return float(2 * size**3 / best_s)


def main(arguments: Sequence[str]) -> None:
    """Measure a task given as JSON, and print what came of it as the last line; or make a model, or find a peak."""
    what, *rest = arguments
    with redirect_stdout(sys.stderr):
        if what == "task":
            answer: Any = asdict(measure(Task(**json.loads(rest[0]))))
        elif what == "trl":
            from gpu_trl import measure_trl

            answer = asdict(measure_trl(Task(**json.loads(rest[0])), checkpointing=rest[1] == "checkpointing"))
        elif what == "peak":
            answer = measure_peak_flops(rest[0], rest[1], int(rest[2]))
        else:
            answer = str(make_model(rest[0], Path(rest[1]), rest[2]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
