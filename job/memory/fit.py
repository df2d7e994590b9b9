"""What fits: engine, micro batch, gradient checkpointing, loss and offload, where they are left open, are chosen by the
memory estimate. The first of the candidates that fits is taken, and they come with the fastest first.

Nothing chosen here changes what is learned: the global batch and the order of rows are settled before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from job.choices import Choices
from job.errors import ConfigError
from job.hardware import Hardware
from job.log import format_bytes
from job.memory.estimate import MemoryEstimate, estimate_memory
from job.memory.model_shape import ModelShape
from job.memory.setup import Setup, pick_setup
from job.presets import is_given
from job.settings import Settings
from job.support import (
    Device,
    Engine,
    why_not_attention,
    why_not_dtype,
    why_not_engine,
    why_not_new_rows,
    why_not_split,
)

# Models whose logits are what their head returns, neither scaled nor capped nor joined by a loss of routing, so that
# the head can be applied to some tokens at a time. Read in transformers 5.23.
PLAIN_HEADS = frozenset(
    {"gemma", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"}
)
_SIZEABLE_LOGITS = 0.25  # of the memory there is: from here on it is better spent on something else
_GPU_MARGIN = 0.06  # of a GPU's memory: the allocator's fragments, and what other programs hold
_HOST_MARGIN = 0.1
_OTHERS_ON_HOST_BYTES = 500 * 2**20  # the job's own process and the launcher
_FLASH_CAPABILITY = (8, 0)


def available_bytes(hardware: Hardware, processes: int) -> int:
    """Return the memory that there is for each training process: its GPU's, or its share of the host's or container's;
    without a margin for what isn't training."""
    if hardware.gpus:
        return int(min(gpu.memory_bytes for gpu in hardware.gpus) * (1 - _GPU_MARGIN))
    return max(0, int(hardware.memory_bytes * (1 - _HOST_MARGIN)) - _OTHERS_ON_HOST_BYTES) // processes


def choose_attention(
    device: Device, dtype: str, capability: tuple[int, int] | None, shape: ModelShape, *, by_document: bool
) -> tuple[str, str]:
    """Return the attention kernel that is chosen by itself, and why."""
    own, why = "sdpa", "PyTorch's own kernel"
    if by_document:
        own, why = "varlen", "PyTorch's own kernel within each of the joined rows, without a mask"
    if capability is None or capability < _FLASH_CAPABILITY:
        return own, why
    lacking = why_not_attention("flash_attention_2", device)
    if lacking is None and dtype == "float32":
        lacking = "it has no float32"
    if lacking is None and not shape.is_known:  # transformers refuses to load a model that can't use it
        lacking = f"{shape.model_type} is not known to have it"
    if lacking is None:
        return "flash_attention_2", "it is installed, and needs no mask for joined rows"
    return own, f"{why}; not flash_attention_2: {lacking}"


@dataclass(frozen=True)
class _Options:
    """What each value may be, the preferred one first; a single one where there is no choice."""

    engines: list[tuple[Engine, bool]]  # with offload or not
    micro_batch_sizes: list[int]
    checkpointing: list[bool]
    losses: list[str]

    def candidates(self, start: Setup) -> Iterator[Setup]:
        """Yield every combination, the preferred one first."""
        for engine, offload in self.engines:
            for micro in self.micro_batch_sizes:
                for checkpointing in self.checkpointing:
                    for loss in self.losses:
                        yield replace(
                            start,
                            engine=engine,
                            offload=offload,
                            micro_batch_size=micro,
                            gradient_checkpointing=checkpointing,
                            loss=loss,
                        )


def choose_what_fits(choices: Choices, settings: Settings, shape: ModelShape, available: int) -> None:
    """Note engine, offload, micro batch, accumulation, checkpointing, loss and the estimate of the memory they need.

    The micro batch must stand there already: it is what is started from. Where nothing fits, the candidate that needs
    the least is taken, with a warning: the estimate may be wrong.
    """
    start = pick_setup(
        choices.values | {"engine": "ddp", "offload": False, "gradient_checkpointing": False, "loss": "full"}
    )
    options = _find_options(choices, settings, start, shape)
    chosen = _choose(options, start, shape, available)
    estimate = estimate_memory(chosen, shape, available)
    _note(choices, settings, options, chosen, shape, estimate)
    share = choices.values["global_batch_size"] // start.world_size
    why = "global batch / (micro x processes of all nodes)"
    choices.put("gradient_accumulation_steps", share // chosen.micro_batch_size, why)
    choices.put("memory", estimate, "estimated for each process")
    if not estimate.fits:
        choices.warnings.append(_warn_of_too_much(chosen, shape, estimate))
    if chosen.offload:
        choices.warnings.append(
            "the base model's weights are kept in host memory: every micro batch waits for all of them to be copied to "
            "the GPU, twice or more, which is several times slower"
        )


def _find_options(choices: Choices, settings: Settings, start: Setup, shape: ModelShape) -> _Options:
    share = choices.values["global_batch_size"] // start.world_size
    micro = start.micro_batch_size
    smaller = [size for size in range(micro, 0, -1) if share % size == 0]
    # On a GPU, what isn't known is better taken for too much than for too little.
    is_unknown_on_gpu = start.device == "cuda" and not shape.is_known
    losses = ["full", "chunked"] if shape.model_type in PLAIN_HEADS else ["full"]
    return _Options(
        engines=list(_find_engines(settings, start)),
        micro_batch_sizes=[micro] if is_given(settings.train, "micro_batch_size") else smaller,
        checkpointing=_one_or(
            choices, settings, "gradient_checkpointing", [True] if is_unknown_on_gpu else [False, True]
        ),
        losses=_one_or(choices, settings, "loss", losses),
    )


def _one_or(choices: Choices, settings: Settings, name: str, alternatives: list[Any]) -> list[Any]:
    value, _ = choices.find(settings.train, name)
    return alternatives if value == "auto" else [value]


def _find_engines(settings: Settings, start: Setup) -> Iterator[tuple[Engine, bool]]:
    """Yield the engines that can be used here, the fastest first, each with offload or not.

    Nothing is split by a single process; ZeRO-3 is then for offload alone. FSDP2 does the same as ZeRO-3, and is for
    what that can't hold.
    """
    asked, offload = settings.parallel.engine, settings.parallel.offload
    _refuse_to_split(start, asked, is_offload_asked=offload is True)
    if asked != "auto":
        usable: list[Engine] = [asked]
    else:
        wanted: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "fsdp2")
        usable = [
            engine
            for engine in wanted
            if why_not_engine(engine, start.device) is None
            and why_not_dtype(engine, start.device, start.dtype) is None
            and _why_not_split(engine, start) is None
        ]
    if offload is not True:
        yield from ((engine, False) for engine in usable if asked != "auto" or engine == "ddp" or start.world_size > 1)
    if "zero3" in usable and (offload is True or (offload == "auto" and start.device == "cuda")):
        yield "zero3", True


def _refuse_to_split(start: Setup, asked: Engine | Literal["auto"], *, is_offload_asked: bool) -> None:
    """Raise ConfigError where weights can't be held as was asked for; they may be stored quantised."""
    if asked != "auto" and (lacking := _why_not_split(asked, start)):
        raise ConfigError(f"SFT_PARALLEL__ENGINE={asked}: {lacking}", hint="use ddp or zero2")
    if is_offload_asked and (lacking := _why_not_split("zero3", start)):
        raise ConfigError(f"SFT_PARALLEL__OFFLOAD=true: {lacking}", hint="leave it at auto")


def _why_not_split(engine: Engine, start: Setup) -> str | None:
    # Embeddings that are trained whole have the new rows in them; the worker looks at which modules these are.
    rows = why_not_new_rows(engine) if start.new_tokens and not start.modules_to_save else None
    return why_not_split(engine, start.quantization) or rows


def _choose(options: _Options, start: Setup, shape: ModelShape, available: int) -> Setup:
    """Return the first candidate that fits without wasting memory on logits, or else the one that needs the least."""
    estimates = [(candidate, estimate_memory(candidate, shape, available)) for candidate in options.candidates(start)]
    for candidate, estimate in estimates:
        has_choice = candidate.loss == "full" and len(options.losses) > 1
        if estimate.fits and not (has_choice and estimate.logits_bytes > _SIZEABLE_LOGITS * available):
            return candidate
    return min(estimates, key=lambda pair: pair[1].total_bytes)[0]


def _note(
    choices: Choices,
    settings: Settings,
    options: _Options,
    chosen: Setup,
    shape: ModelShape,
    estimate: MemoryEstimate,
) -> None:
    """Note what was chosen, each value with the estimate that it was chosen by."""
    where = "on each GPU" if chosen.device == "cuda" else "for each process"

    def explain(name: str, preferred: Any, why: str) -> str:
        if getattr(chosen, name) == preferred:
            return why
        instead = estimate_memory(replace(chosen, **{name: preferred}), shape, estimate.available_bytes)
        return f"{_write(preferred)} would need {_compare(instead)} {where}"

    needed = f"{_compare(estimate)} {where}"
    engine, offload = options.engines[0]
    why = explain("engine", engine, needed)
    choices.take("engine", settings.parallel, "engine", auto=chosen.engine, why=why)
    why = explain("offload", offload, needed)
    choices.take("offload", settings.parallel, "offload", auto=chosen.offload, why=why)
    if chosen.micro_batch_size != options.micro_batch_sizes[0]:
        why = explain("micro_batch_size", options.micro_batch_sizes[0], "")
        choices.put("micro_batch_size", chosen.micro_batch_size, f"auto: {why}")
    why = explain("gradient_checkpointing", options.checkpointing[0], needed)
    if not shape.is_known and len(options.checkpointing) == 1:
        why = f"what {shape.model_type} needs is not known"
    choices.take(
        "gradient_checkpointing",
        settings.train,
        "gradient_checkpointing",
        auto=chosen.gradient_checkpointing,
        why=why,
    )
    why = explain("loss", options.losses[0], f"the logits take {format_bytes(estimate.logits_bytes)}")
    choices.take("loss", settings.train, "loss", auto=chosen.loss, why=why)


def _write(value: object) -> str:
    return f"{value}".lower()


def _compare(estimate: MemoryEstimate) -> str:
    return f"{format_bytes(estimate.total_bytes)} of {format_bytes(estimate.available_bytes)}"


def _warn_of_too_much(chosen: Setup, shape: ModelShape, estimate: MemoryEstimate) -> str:
    remedies = ["a smaller SFT_DATA__MAX_LENGTH"]
    if chosen.quantization == "none":
        quantized = replace(chosen, quantization="nf4", engine="ddp", offload=False)
        needed = estimate_memory(quantized, shape, estimate.available_bytes)
        remedies.append(f"SFT_QUANTIZATION=nf4 (with ddp: {_compare(needed)})")
    if chosen.micro_batch_size > 1:
        remedies.append("SFT_TRAIN__MICRO_BATCH_SIZE=1")
    if not chosen.gradient_checkpointing:
        remedies.append("SFT_TRAIN__GRADIENT_CHECKPOINTING=true")
    remedies.append("a larger GPU or more of them" if chosen.device == "cuda" else "more memory")
    return f"training may run out of memory, by the estimate: {estimate.describe()}; remedies: {', '.join(remedies)}"
