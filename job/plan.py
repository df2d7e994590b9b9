"""Settings, data statistics and hardware become a frozen TrainPlan: all that the workers do, decided beforehand.

`plan_parallel` comes first and needs neither data nor model, so that impossible arithmetic is refused before any
download. `make_plan` fills in the rest. Both note for each value where it came from.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from job.errors import ConfigError
from job.hardware import Hardware
from job.log import logger
from job.settings import Settings
from job.settings_fields import Group

_DEFAULT_GLOBAL_BATCH_SIZE = 8
_MAX_AUTO_MICRO_BATCH_SIZE = 8
_MAX_AUTO_MICRO_BATCH_TOKENS = 4096
_LOG_LINES_PER_RUN = 100

# Architectures whose attention transformers builds from position ids, so that documents joined into one sequence don't
# see each other. Others are padded unless SFT_TRAIN__PACKING=true; the worker proves the isolation either way.
_PACKABLE_MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"}
    | {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
)

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]


class TrainPlan(BaseModel):
    """Everything the workers do. `sources` says for each value where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    model_revision: str
    attn_implementation: str

    lora_r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: Literal["all-linear"] | list[str]

    train_rows: int
    eval_rows: int
    train_tokens: int
    supervised_tokens: int
    max_length_tokens: int
    packing: bool

    device: Device
    dtype: Dtype
    engine: Literal["ddp"]
    processes: int
    threads_per_process: int

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int  # sequences: micro batch x gradient accumulation x processes
    steps: int
    epochs: float
    warmup_steps: int
    learning_rate: float
    scheduler: str
    max_grad_norm: float
    gradient_checkpointing: bool
    seed: int
    logging_steps: int

    sources: dict[str, str]


@dataclass(frozen=True)
class ParallelPlan:
    """Devices, processes, precision and global batch: what is known before any download."""

    device: Device
    processes: int
    threads_per_process: int
    dtype: Dtype
    global_batch_size: int
    sources: dict[str, str]


@dataclass(frozen=True)
class DataFacts:
    """What the plan must know of the base model and of the tokenised rows that were kept."""

    model_revision: str
    model_type: str
    max_length_tokens: int
    max_length_source: str
    train_rows: int
    eval_rows: int
    train_tokens: int
    supervised_tokens: int


class _Choices:
    """Values under the plan's field names, each with its source."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def put(self, name: str, value: object, source: str) -> None:
        self.values[name] = value
        self.sources[name] = source

    def take(self, name: str, group: Group, field: str, *, auto: object = None, why: str = "") -> None:
        """Take a setting's value, or `auto` with its reason where the setting says "auto"."""
        value = getattr(group, field)
        if value == "auto":
            self.put(name, auto, f"auto: {why}")
        else:
            self.put(name, value, setting_source(group, field))


def setting_source(group: Group, field: str) -> str:
    """Return the variable that a setting was given by, or "default"."""
    prefix = type(group).__name__.removesuffix("Settings").upper()
    return f"SFT_{prefix}__{field.upper()}" if field in group.model_fields_set else "default"


def plan_parallel(settings: Settings, hardware: Hardware) -> ParallelPlan:
    """Choose device, processes, precision and global batch, and refuse arithmetic that can't work out.

    Raises ConfigError.
    """
    choices = _Choices()
    gpus = hardware.gpus
    device: Device = "cuda" if gpus else "cpu"
    choices.put("device", device, f"found {len(gpus)} x {gpus[0].name}" if gpus else "no GPU found")
    _choose_processes(choices, settings, hardware)
    processes = choices.values["processes"]
    choices.put("threads_per_process", max(1, hardware.cpu_cores // processes), f"{hardware.cpu_cores} cores")
    _choose_dtype(choices, settings, hardware)
    _check_attention(settings, device)
    micro = 1 if settings.train.micro_batch_size == "auto" else settings.train.micro_batch_size
    choices.take(
        "global_batch_size",
        settings.train,
        "global_batch_size",
        auto=math.ceil(_DEFAULT_GLOBAL_BATCH_SIZE / (micro * processes)) * micro * processes,
        why=f"{_DEFAULT_GLOBAL_BATCH_SIZE}, or the next multiple of micro batch x processes",
    )
    _check_batch_arithmetic(choices, settings)
    if settings.train.max_steps is not None:
        count_warmup_steps(settings.train.warmup, settings.train.max_steps)
    return ParallelPlan(**choices.values, sources=choices.sources)


def make_plan(settings: Settings, parallel: ParallelPlan, data: DataFacts) -> TrainPlan:
    """Decide everything that was left open, from the data and the base model's architecture.

    Raises ConfigError where the settings can't work on this data.
    """
    model, lora, train = settings.model, settings.lora, settings.train
    processes, global_batch_size = parallel.processes, parallel.global_batch_size
    choices = _Choices()
    for name, source in parallel.sources.items():
        choices.put(name, getattr(parallel, name), source)
    choices.take("model_id", model, "id")
    choices.put("model_revision", data.model_revision, "resolved")
    choices.take("attn_implementation", model, "attn_implementation", auto="sdpa", why="PyTorch's own kernel")
    choices.take("lora_r", lora, "r")
    choices.take("lora_alpha", lora, "alpha", auto=2 * lora.r, why="2r")
    choices.take("lora_dropout", lora, "dropout")
    choices.take("target_modules", lora, "target_modules")
    choices.put("max_length_tokens", data.max_length_tokens, data.max_length_source)
    for name in ("train_rows", "eval_rows", "train_tokens", "supervised_tokens"):
        choices.put(name, getattr(data, name), "data")
    packable = data.model_type in _PACKABLE_MODEL_TYPES
    why = f"{data.model_type} {'keeps' if packable else 'is not known to keep'} joined rows apart"
    choices.take("packing", train, "packing", auto=packable, why=why)
    choices.take("engine", settings.parallel, "engine", auto="ddp", why="the model is copied to every process")
    micro = choose_micro_batch_size(global_batch_size // processes, data.max_length_tokens)
    why = f"up to {_MAX_AUTO_MICRO_BATCH_SIZE} within {_MAX_AUTO_MICRO_BATCH_TOKENS} tokens"
    choices.take("micro_batch_size", train, "micro_batch_size", auto=micro, why=why)
    per_forward = choices.values["micro_batch_size"] * processes
    choices.put("gradient_accumulation_steps", global_batch_size // per_forward, "global batch / (micro x processes)")
    _choose_schedule(choices, settings, data.train_rows, global_batch_size)
    choices.take(
        "gradient_checkpointing",
        train,
        "gradient_checkpointing",
        auto=parallel.device == "cuda",
        why="memory is short on a GPU" if parallel.device == "cuda" else "memory is plenty on a CPU",
    )
    return TrainPlan(**choices.values, sources=choices.sources)


def count_steps(epochs: float, rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps that cover `epochs` passes over the rows.

    The last step is filled up from the next pass, so that every step has as many sequences and no row is left out.
    """
    return max(1, math.ceil(epochs * rows / global_batch_size - 1e-9))


def count_warmup_steps(warmup: float, steps: int) -> int:
    """Return the steps of warmup for a ratio (below 1) or a number of steps.

    Raises ConfigError for a warmup that leaves no step at the full learning rate.
    """
    if warmup < 1:
        # Rounded down, for transformers' schedule starts at 0: a warmup of a single step is a step without learning.
        return int(warmup * steps)
    if warmup >= steps:
        raise ConfigError(
            f"SFT_TRAIN__WARMUP={warmup:g}: the run has {steps} steps, so the learning rate would "
            f"reach only {100 * (steps - 1) / warmup:.0f} % of SFT_TRAIN__LEARNING_RATE, at the last one",
            hint=f"use SFT_TRAIN__WARMUP={max(1, steps // 10) if steps > 1 else 0}, or a ratio such as 0.1",
        )
    return int(warmup)


def choose_micro_batch_size(sequences_per_process: int, max_length_tokens: int) -> int:
    """Return the largest divisor of a process's share of the global batch that stays within both limits."""
    most = max(1, min(_MAX_AUTO_MICRO_BATCH_SIZE, _MAX_AUTO_MICRO_BATCH_TOKENS // max_length_tokens))
    return max(size for size in range(1, most + 1) if sequences_per_process % size == 0)


def _choose_processes(choices: _Choices, settings: Settings, hardware: Hardware) -> None:
    gpus = len(hardware.gpus)
    asked = settings.parallel.processes
    if asked != "auto" and gpus and asked > gpus:
        raise ConfigError(
            f"SFT_PARALLEL__PROCESSES={asked}: only {gpus} GPU{'s are' if gpus > 1 else ' is'} visible",
            hint="ask for one process a GPU, or leave it at auto; CUDA_VISIBLE_DEVICES limits what is visible",
        )
    if asked != "auto" and not gpus and asked > hardware.cpu_cores:
        logger.warning("SFT_PARALLEL__PROCESSES=%d: only %d CPU cores are here", asked, hardware.cpu_cores)
    why = f"one per GPU ({gpus} found)" if gpus else "one on a CPU"
    choices.take("processes", settings.parallel, "processes", auto=max(1, gpus), why=why)


def _choose_dtype(choices: _Choices, settings: Settings, hardware: Hardware) -> None:
    asked = settings.model.dtype
    if hardware.gpus:
        has_bf16 = all(gpu.compute_capability >= (8, 0) for gpu in hardware.gpus)
        if asked == "bfloat16" and not has_bf16:
            raise ConfigError(
                f"SFT_MODEL__DTYPE=bfloat16: {hardware.gpus[0].name} has no bfloat16 arithmetic",
                hint="use float16, or leave it at auto",
            )
        automatic, why = ("bfloat16", "the GPU has it") if has_bf16 else ("float16", "the GPU has no bfloat16")
    else:
        if asked == "float16":
            raise ConfigError(
                "SFT_MODEL__DTYPE=float16: training in float16 needs a GPU", hint="use float32, or leave it at auto"
            )
        if asked == "bfloat16" and not hardware.cpu_has_bf16_matrix_units:
            logger.warning("SFT_MODEL__DTYPE=bfloat16: this CPU has no AMX; float32 is 25 to 30 times faster here")
        amx = hardware.cpu_has_bf16_matrix_units
        automatic, why = ("bfloat16", "the CPU has AMX") if amx else ("float32", "the CPU has no bfloat16 matrix units")
    choices.take("dtype", settings.model, "dtype", auto=automatic, why=why)


def _check_attention(settings: Settings, device: Device) -> None:
    if settings.model.attn_implementation != "flash_attention_2":
        return
    if device == "cpu":
        raise ConfigError(
            "SFT_MODEL__ATTN_IMPLEMENTATION=flash_attention_2: needs a GPU", hint="use sdpa, or leave it at auto"
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "SFT_MODEL__ATTN_IMPLEMENTATION=flash_attention_2: the package flash-attn is not installed",
            hint="install flash-attn, use sdpa, or leave it at auto",
        )


def _check_batch_arithmetic(choices: _Choices, settings: Settings) -> None:
    processes, global_batch = choices.values["processes"], choices.values["global_batch_size"]
    micro = 1 if settings.train.micro_batch_size == "auto" else settings.train.micro_batch_size
    if global_batch % (micro * processes) == 0:
        return
    shown_micro = "" if micro == 1 else f"SFT_TRAIN__MICRO_BATCH_SIZE={micro} x "
    raise ConfigError(
        f"SFT_TRAIN__GLOBAL_BATCH_SIZE={global_batch} ({choices.sources['global_batch_size']}) can't be split: it is "
        f"not a multiple of {shown_micro}{processes} process{'es' if processes > 1 else ''}",
        hint=f"use a multiple of {micro * processes}",
    )


def _choose_schedule(choices: _Choices, settings: Settings, train_rows: int, global_batch_size: int) -> None:
    train = settings.train
    if train.max_steps is None:
        epochs = 3 if train.epochs == "auto" else train.epochs
        steps, source = count_steps(epochs, train_rows, global_batch_size), f"{epochs:g} epochs of the rows"
    else:
        steps, source = train.max_steps, setting_source(train, "max_steps")
    choices.put("steps", steps, source)
    choices.put("epochs", round(steps * global_batch_size / train_rows, 4), "steps x global batch / rows")
    source = setting_source(train, "warmup")
    choices.put("warmup_steps", count_warmup_steps(train.warmup, steps), f"{source} ({train.warmup:g})")
    for name in ("learning_rate", "scheduler", "max_grad_norm", "seed"):
        choices.take(name, train, name)
    auto_logging = max(1, steps // _LOG_LINES_PER_RUN)
    choices.take("logging_steps", train, "logging_steps", auto=auto_logging, why=f"about {_LOG_LINES_PER_RUN} a run")
    if global_batch_size > train_rows:
        logger.warning(
            "a global batch of %d sequences holds some of the %d training rows more than once; "
            "SFT_TRAIN__GLOBAL_BATCH_SIZE=%d would not",
            global_batch_size,
            train_rows,
            train_rows,
        )
