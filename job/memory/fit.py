"""What fits: engine, micro batch, gradient checkpointing, loss and offload, where they are left open, are chosen by the
memory estimate. The first of the candidates that fits is taken, and they come with the fastest first.

Nothing chosen here changes what is learned: the global batch and the order of rows are settled before.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from job.choices import Choices
from job.hardware import Hardware
from job.log import format_bytes
from job.memory.candidates import Options, find_options
from job.memory.estimate import LOSS_CHUNK_TOKENS, MemoryEstimate, estimate_memory
from job.memory.model_shape import ModelShape
from job.memory.setup import Setup, pick_setup
from job.settings import Settings
from job.support import Device, why_not_attention

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


def choose_what_fits(
    choices: Choices, settings: Settings, shape: ModelShape, available: int, count_tokens: Callable[[int], int]
) -> None:
    """Note engine, offload, micro batch, accumulation, checkpointing, loss and the estimate of the memory they need.

    The micro batch must stand there already: it is what is started from, and `count_tokens` says how many tokens the
    largest of so many rows has. Where nothing fits, the candidate that needs the least is taken, with a warning: the
    estimate may be wrong.
    """
    values = choices.values
    start = pick_setup(
        values
        | {"engine": "ddp", "offload": False, "micro_batch_tokens": 0, "gradient_checkpointing": 0.0, "loss": "full"}
    )
    options = find_options(choices, settings, start, shape, count_tokens)
    chosen = _choose(options, start, shape, available)
    estimate = estimate_memory(chosen, shape, available)
    _note(choices, settings, options, chosen, shape, estimate)
    share = values["global_batch_size"] // start.world_size
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


def _choose(options: Options, start: Setup, shape: ModelShape, available: int) -> Setup:
    """Return the first candidate that fits, or else the one that needs the least."""
    estimates = [(candidate, estimate_memory(candidate, shape, available)) for candidate in options.candidates(start)]
    fitting = (candidate for candidate, estimate in estimates if estimate.fits)
    return next(fitting, min(estimates, key=lambda pair: pair[1].total_bytes)[0])


def _note(
    choices: Choices,
    settings: Settings,
    options: Options,
    chosen: Setup,
    shape: ModelShape,
    estimate: MemoryEstimate,
) -> None:
    """Note what was chosen, each value with the estimate that it was chosen by."""
    where = "on each GPU" if chosen.device == "cuda" else "for each process"

    def explain(name: str, preferred: Any, why: str) -> str:
        if getattr(chosen, name) == preferred:
            return why
        other = replace(chosen, **{name: preferred})
        other = replace(other, micro_batch_tokens=options.micro_batches[other.micro_batch_size])
        instead = estimate_memory(other, shape, estimate.available_bytes)
        if instead.fits:
            return f"{_write(preferred)} would be slower"
        return f"{_write(preferred)} would need {_compare(instead)} {where}"

    needed = f"{_compare(estimate)} {where}"
    _note_micro_batch(choices, options, chosen, explain)
    engine, offload = options.engines[0]
    why = explain("engine", engine, needed)
    choices.take("engine", settings.parallel, "engine", auto=chosen.engine, why=why)
    why = explain("offload", offload, needed)
    choices.take("offload", settings.parallel, "offload", auto=chosen.offload, why=why)
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
    choices.take("loss", settings.train, "loss", auto=chosen.loss, why=_explain_loss(options, chosen, shape))


def _note_micro_batch(
    choices: Choices, options: Options, chosen: Setup, explain: Callable[[str, Any, str], str]
) -> None:
    micro, most = chosen.micro_batch_size, chosen.micro_batch_size * chosen.max_length_tokens
    if micro != (first := next(iter(options.micro_batches))):
        choices.put("micro_batch_size", micro, f"auto: {explain('micro_batch_size', first, '')}")
    source = "micro batch x max_length" if chosen.micro_batch_tokens == most else "the largest micro batch of the run"
    choices.put("micro_batch_tokens", chosen.micro_batch_tokens, source)


def _explain_loss(options: Options, chosen: Setup, shape: ModelShape) -> str:
    if chosen.loss == "chunked":
        return f"the logits of {LOSS_CHUNK_TOKENS:,} supervised tokens at a time"
    if len(options.losses) == 1:
        return f"the head of {shape.model_type} is not known to be all that makes its logits"
    return f"{chosen.engine} would gather the head for each chunk"


def _write(value: object) -> str:
    return "none" if value == 0.0 and value is not False else f"{value}".lower()


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
    if chosen.gradient_checkpointing < 1:
        remedies.append("SFT_TRAIN__GRADIENT_CHECKPOINTING=true")
    remedies.append("a larger GPU or more of them" if chosen.device == "cuda" else "more memory")
    return f"training may run out of memory, by the estimate: {estimate.describe()}; remedies: {', '.join(remedies)}"
