"""What an engine, a micro batch, gradient checkpointing and a loss may be where they are left open, the fastest first:
by engine, and with the same engine by how long a token takes. What needs too much memory is sorted out in
`job.memory.fit`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from job.choices import Choices
from job.errors import ConfigError
from job.memory.model_shape import ModelShape
from job.memory.setup import Setup
from job.presets import is_given
from job.settings import Settings
from job.support import Engine, why_not_dtype, why_not_engine, why_not_new_rows, why_not_split

# Models whose logits are what their head returns, neither scaled nor capped nor joined by a loss of routing, so that
# the head can be applied to some tokens at a time. Read in transformers 5.23.
PLAIN_HEADS = frozenset(
    {"gemma", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"}
)
# Gradient checkpointing is chosen in eighths of the layers, of which one more costs 6 % of a step.
_SHARES = [eighths / 8 for eighths in range(9)]
# What a token takes with all layers computed again, of what it takes without. A frozen base has no gradients of its
# weights, so that the second forward pass is one of three that take as long; the head has none.
_TIME_OF_CHECKPOINTING = 1.45
# Each micro batch reads all weights, which takes as long as computing so many tokens. On a CPU as measured; on a GPU by
# what an H100 computes, and what its memory reads, in a second (989 TFLOP/s, 3.35 TB/s); where weights are gathered
# from other GPUs, or copied from the host's memory, at 200 and 25 GB/s twice, of 400 TFLOP/s.
_TOKENS_OF_READING = {"cpu": 50, "cuda": 300}
_TOKENS_OF_GATHERING, _TOKENS_OF_COPYING = 2_000, 16_000
# The loss of all logits at once takes somewhat longer where not all tokens are supervised, and as long where they are.
# Engines that gather weights gather the head's for each chunk.
_TIME_OF_FULL_LOSS, _TIME_OF_GATHERED_CHUNKS = 1.05, 1.1


@dataclass(frozen=True)
class Options:
    """What each value may be, the preferred one first; a single one where there is no choice."""

    engines: list[tuple[Engine, bool]]  # with offload or not
    micro_batches: dict[int, int]  # rows -> tokens of the largest
    checkpointing: list[float]
    losses: list[str]
    tokens_per_row: float

    def candidates(self, start: Setup) -> Iterator[Setup]:
        """Yield every combination, the preferred one first."""
        for engine, offload in self.engines:
            alike = [
                replace(
                    start,
                    engine=engine,
                    offload=offload,
                    micro_batch_size=micro,
                    micro_batch_tokens=tokens,
                    gradient_checkpointing=share,
                    loss=loss,
                )
                for micro, tokens in self.micro_batches.items()
                for share in self.checkpointing
                for loss in self.losses
            ]
            yield from sorted(alike, key=self.relative_time)

    def relative_time(self, setup: Setup) -> float:
        """Return how long a token takes, compared with other setups that have the same engine."""
        is_gathered = setup.engine in ("zero3", "fsdp2")
        idle = _TOKENS_OF_READING[setup.device]
        if is_gathered:
            idle = _TOKENS_OF_COPYING if setup.offload else _TOKENS_OF_GATHERING
        loss = _TIME_OF_FULL_LOSS if setup.loss == "full" else _TIME_OF_GATHERED_CHUNKS if is_gathered else 1.0
        passes = 1 + setup.gradient_checkpointing * (_TIME_OF_CHECKPOINTING - 1)
        return passes * loss * (1 + idle / (setup.micro_batch_size * self.tokens_per_row))


def find_options(
    choices: Choices, settings: Settings, start: Setup, shape: ModelShape, count_tokens: Callable[[int], int]
) -> Options:
    """Return what each value may be for a model of this shape, from the micro batch of `start` down.

    `count_tokens` says how many tokens the largest micro batch of so many rows has. Raises ConfigError where weights
    can't be held as was asked for.
    """
    values = choices.values
    share = values["global_batch_size"] // start.world_size
    micro = start.micro_batch_size
    sizes = [size for size in range(micro, 0, -1) if share % size == 0]
    # On a GPU, what isn't known is better taken for too much than for too little.
    is_unknown_on_gpu = start.device == "cuda" and not shape.is_known
    shares = _SHARES if shape.is_known else [1.0] if is_unknown_on_gpu else [0.0, 1.0]
    losses = ["chunked", "full"] if shape.model_type in PLAIN_HEADS else ["full"]
    return Options(
        engines=list(_find_engines(settings, start)),
        micro_batches={
            size: count_tokens(size) for size in ([micro] if is_given(settings.train, "micro_batch_size") else sizes)
        },
        checkpointing=[float(one) for one in _one_or(choices, settings, "gradient_checkpointing", shares)],
        losses=_one_or(choices, settings, "loss", losses),
        tokens_per_row=values["train_tokens"] / values["train_rows"],
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
