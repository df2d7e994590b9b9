"""Settings, data statistics and hardware become a frozen TrainPlan: all that the workers do, decided beforehand.

`plan_parallel` comes first and needs neither data nor model. `make_plan` fills in the rest. Both note for each value
where it came from, and what a person should be warned of.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from job.batch import choose_global_batch, choose_micro_batch
from job.choices import Choices, setting_source
from job.errors import ConfigError
from job.memory.estimate import MemoryEstimate
from job.memory.fit import choose_attention, choose_what_fits
from job.memory.model_shape import ModelShape
from job.parallel import Dtype, ParallelPlan, batch_multiple
from job.presets import find_preset, is_given
from job.quantization import choose_quantization
from job.schedule import (
    Scheduler,
    choose_epochs,
    choose_logging_steps,
    count_steps,
    count_steps_per_pass,
    count_warmup_steps,
    limit_warmup_steps,
    warn_of_few_steps,
    warn_of_idle_patience,
    warn_of_little_learning,
    warn_of_long_warmup,
    warn_of_lost_checkpoints,
    warn_of_repeated_rows,
)
from job.settings import Settings
from job.settings_groups import CheckpointSettings, TrainSettings
from job.stream import micro_batch_counter
from job.support import VARLEN_MODEL_TYPES, Attention, Device, Engine, Quantization, why_not_paged_adamw, why_not_varlen

if TYPE_CHECKING:
    import numpy as np


# Architectures whose attention transformers builds from position ids, so that documents joined into one sequence don't
# see each other. Others are padded unless SFT_TRAIN__PACKING=true; the worker proves the isolation either way.
_PACKABLE_MODEL_TYPES = VARLEN_MODEL_TYPES | {"gemma2", "qwen2_moe"}


class TrainPlan(BaseModel):
    """Everything the workers do. `sources` says for each value where it came from, `warnings` what is probably wrong
    with them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    model_revision: str
    attn_implementation: Attention
    quantization: Quantization
    chat_template: str

    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_rslora: bool
    lora_dora: bool
    target_modules: Literal["all-linear"] | list[str]
    modules_to_save: list[str]
    new_tokens: list[str]

    train_rows: int
    eval_rows: int
    train_tokens: int
    supervised_tokens: int
    max_length_tokens: int
    truncation: str
    packing: bool

    device: Device
    dtype: Dtype
    engine: Engine
    offload: bool
    nodes: int
    processes: int  # on each node
    threads_per_process: int

    micro_batch_size: int
    micro_batch_tokens: int  # of the largest; padding counts
    gradient_accumulation_steps: int
    global_batch_size: int  # sequences: micro batch x gradient accumulation x world size
    steps: int
    epochs: float
    warmup_steps: int
    learning_rate: float
    scheduler: Scheduler
    optimizer: Literal["adamw", "paged_adamw_8bit"]
    max_grad_norm: float
    gradient_checkpointing: float  # share of the layers, the first ones, whose activations are computed twice
    loss: Literal["full", "chunked", "liger"]
    early_stopping_patience: int | None  # evaluations
    eval_interval_steps: int | None  # None without early stopping
    seed: int
    logging_steps: int
    checkpoint_every_steps: int | None  # either of the two is None
    checkpoint_every_minutes: float | None

    memory: MemoryEstimate

    sources: dict[str, str]
    warnings: list[str]

    @property
    def world_size(self) -> int:
        """The processes on all nodes."""
        return self.nodes * self.processes


@dataclass(frozen=True)
class DataFacts:
    """What the plan must know of the base model and of the tokenised rows that were kept.

    `row_tokens` (N,) are those of each training row; None: any may be as long as is allowed. `chat_template` names it
    for people: "the tokenizer's own", "chatml", "none". `new_tokens` are those that it adds. `stored_quantization` is
    that of the base model's weights.
    """

    model_revision: str
    model_type: str
    shape: ModelShape
    chat_template: str
    max_length_tokens: int
    max_length_source: str
    truncation: str
    train_rows: int
    eval_rows: int
    train_tokens: int
    supervised_tokens: int
    row_tokens: "np.ndarray | None" = None
    new_tokens: list[str] = field(default_factory=list)
    stored_quantization: Quantization = "none"


def make_plan(settings: Settings, parallel: ParallelPlan, data: DataFacts) -> TrainPlan:
    """Decide everything that was left open, from the data and the base model's architecture.

    Raises ConfigError where the settings can't work on this data.
    """
    preset = find_preset(settings.model.id)
    choices = Choices(preset if preset is not None and preset.applies_to(data.train_rows) else None)
    for name, source in parallel.sources.items():
        choices.put(name, getattr(parallel, name), source)
    choices.warnings += parallel.warnings
    _choose_model(choices, settings, data)
    _note_data(choices, settings, data)
    _choose_attention(choices, settings, data, parallel)
    choose_global_batch(choices, settings.train, parallel.world_size)
    _choose_length(choices, settings.train, data.train_rows)
    _choose_learning(choices, settings.train, parallel.device)
    count_tokens = cache(micro_batch_counter(choices.values, data.row_tokens))
    choose_micro_batch(choices, settings.train, parallel.world_size, count_tokens)
    choose_what_fits(choices, settings, data.shape, parallel.available_bytes, count_tokens)
    _choose_early_stopping(choices, settings.train, data)
    _choose_checkpoints(choices, settings.checkpoint)
    choices.warnings += warn_of_lost_checkpoints(settings.output.uri, settings.checkpoint.uri)
    _warn(choices, settings.train, data.train_rows, parallel.world_size)
    return TrainPlan(**choices.values, sources=choices.sources, warnings=choices.warnings)


def _choose_model(choices: Choices, settings: Settings, data: DataFacts) -> None:
    model, lora = settings.model, settings.lora
    choices.take("model_id", model, "id")
    choices.put("model_revision", data.model_revision, "resolved")
    choose_quantization(choices, settings, data.stored_quantization, choices.values["device"])
    choices.put("chat_template", data.chat_template, setting_source(model, "chat_template"))
    choices.take("lora_r", lora, "r")
    choices.take("lora_alpha", lora, "alpha", auto=2 * choices.values["lora_r"], why="2r")
    choices.take("lora_dropout", lora, "dropout")
    choices.take("lora_rslora", lora, "rslora")
    choices.take("lora_dora", lora, "dora")
    choices.take("target_modules", lora, "target_modules")
    choices.take("modules_to_save", lora, "modules_to_save")
    choices.put("new_tokens", data.new_tokens, "added by the chat template")


def _note_data(choices: Choices, settings: Settings, data: DataFacts) -> None:
    for name in ("train_rows", "eval_rows", "train_tokens", "supervised_tokens"):
        choices.put(name, getattr(data, name), "data")
    choices.put("max_length_tokens", data.max_length_tokens, data.max_length_source)
    choices.put("truncation", data.truncation, setting_source(settings.data, "truncation"))
    packable = data.model_type in _PACKABLE_MODEL_TYPES
    why = f"{data.model_type} {'keeps' if packable else 'is not known to keep'} joined rows apart"
    choices.take("packing", settings.train, "packing", auto=packable, why=why)


def _choose_attention(choices: Choices, settings: Settings, data: DataFacts, parallel: ParallelPlan) -> None:
    lacking = why_not_varlen(data.model_type, packing=choices.values["packing"])
    if settings.model.attn_implementation == "varlen" and lacking is not None:
        raise ConfigError(f"SFT_MODEL__ATTN_IMPLEMENTATION=varlen: {lacking}", hint="use sdpa, or leave it at auto")
    attention, why = choose_attention(
        parallel.device, parallel.dtype, parallel.compute_capability, data.shape, by_document=lacking is None
    )
    choices.take("attn_implementation", settings.model, "attn_implementation", auto=attention, why=why)


def _choose_length(choices: Choices, train: TrainSettings, train_rows: int) -> None:
    """Choose steps and epochs; the epochs come out a little higher than asked for, since steps are whole."""
    global_batch_size = choices.values["global_batch_size"]
    if train.max_steps is not None:
        steps, steps_source = train.max_steps, setting_source(train, "max_steps")
        epochs_source = "steps x global batch / rows"
    else:
        epochs, epochs_source = choices.find(train, "epochs")
        if epochs == "auto":
            epochs, epochs_source = choose_epochs(train_rows, global_batch_size)
        steps = count_steps(epochs, train_rows, global_batch_size)
        steps_source = f"{epochs:g} x {train_rows:,} rows in batches of {global_batch_size:,}"
    choices.put("steps", steps, steps_source)
    choices.put("epochs", round(steps * global_batch_size / train_rows, 4), epochs_source)
    interval, why = choose_logging_steps(steps)
    choices.take("logging_steps", train, "logging_steps", auto=interval, why=why)


def _choose_learning(choices: Choices, train: TrainSettings, device: Device) -> None:
    warmup, source = choices.find(train, "warmup")
    if is_given(train, "warmup"):
        warmup_steps, rule = count_warmup_steps(warmup, choices.values["steps"]), ""
    else:
        warmup_steps, rule = limit_warmup_steps(warmup, choices.values["steps"])
    choices.put("warmup_steps", warmup_steps, rule or f"{source} ({warmup:g})")
    for name in ("learning_rate", "scheduler", "max_grad_norm", "seed"):
        choices.take(name, train, name)
    _choose_optimizer(choices, train, device)


def _choose_optimizer(choices: Choices, train: TrainSettings, device: Device) -> None:
    optimizer, source = choices.find(train, "optimizer")
    if optimizer == "auto":
        optimizer, source = "adamw", "auto: no preset names another"
    lacking = why_not_paged_adamw(device) if optimizer == "paged_adamw_8bit" else None
    if lacking is not None:  # a preset's wish: plan_parallel refuses to be asked for it
        optimizer, source = "adamw", f"auto: {source} names {optimizer}, but {lacking}"
    choices.put("optimizer", optimizer, source)


def _choose_early_stopping(choices: Choices, train: TrainSettings, data: DataFacts) -> None:
    choices.take("early_stopping_patience", train, "early_stopping_patience")
    patience = choices.values["early_stopping_patience"]
    if patience is None:
        choices.put("eval_interval_steps", None, "no early stopping")
        return
    if data.eval_rows == 0:
        raise ConfigError(
            f"SFT_TRAIN__EARLY_STOPPING_PATIENCE={patience}: none of the {data.train_rows} rows is held out, so there "
            f"is no held-out loss to watch",
            hint="set SFT_DATA__EVAL_URI, or SFT_DATA__EVAL_FRACTION=0.1",
        )
    interval = count_steps_per_pass(data.train_rows, choices.values["global_batch_size"])
    choices.put("eval_interval_steps", interval, "one pass of the rows")


def _choose_checkpoints(choices: Choices, checkpoint: CheckpointSettings) -> None:
    choices.take("checkpoint_every_steps", checkpoint, "every_steps")
    if checkpoint.every_steps is None:
        choices.take("checkpoint_every_minutes", checkpoint, "every_minutes")
        return
    if is_given(checkpoint, "every_minutes"):
        raise ConfigError(
            f"SFT_CHECKPOINT__EVERY_STEPS={checkpoint.every_steps}, "
            f"SFT_CHECKPOINT__EVERY_MINUTES={checkpoint.every_minutes:g}: only one of them can hold",
            hint="leave one of them out",
        )
    choices.put("checkpoint_every_minutes", None, "SFT_CHECKPOINT__EVERY_STEPS")


def _warn(choices: Choices, train: TrainSettings, train_rows: int, world_size: int) -> None:
    """Collect what is probably wrong with the schedule as it was chosen."""
    chosen: dict[str, Any] = choices.values
    steps, warmup_steps, batch = chosen["steps"], chosen["warmup_steps"], chosen["global_batch_size"]
    by_max_steps = train.max_steps is not None
    if is_given(train, "warmup"):
        choices.warnings += warn_of_long_warmup(train.warmup, warmup_steps, steps)
    choices.warnings += warn_of_few_steps(steps, train_rows, batch, by_max_steps=by_max_steps)
    choices.warnings += warn_of_little_learning(
        steps, warmup_steps, chosen["scheduler"], chosen["learning_rate"], by_max_steps=by_max_steps
    )
    choices.warnings += warn_of_repeated_rows(train_rows, batch, multiple=batch_multiple(train, world_size))
    if chosen["early_stopping_patience"] is not None:
        choices.warnings += warn_of_idle_patience(
            chosen["early_stopping_patience"], steps, chosen["eval_interval_steps"]
        )
