"""How many sequences a step learns from, and how many a process takes at a time."""

import math
from collections.abc import Callable

from job.choices import Choices
from job.parallel import batch_multiple
from job.settings_groups import TrainSettings

_DEFAULT_GLOBAL_BATCH_SIZE = 8
_MAX_AUTO_PADDED_SEQUENCES = 8
_MAX_AUTO_MICRO_BATCH_TOKENS = 4096


def choose_global_batch(choices: Choices, train: TrainSettings, world_size: int) -> None:
    """Choose the global batch, which decides what is learned."""
    multiple = batch_multiple(train, world_size)
    asked, source = choices.find(train, "global_batch_size")
    if asked == "auto":
        asked, source = _DEFAULT_GLOBAL_BATCH_SIZE, "auto"
    global_batch_size = math.ceil(asked / multiple) * multiple  # what is given was checked by plan_parallel
    if global_batch_size != asked:
        source += f": {asked}, rounded up to a multiple of {multiple} for {_name_split(train, world_size)}"
    choices.put("global_batch_size", global_batch_size, source)


def choose_micro_batch(
    choices: Choices, train: TrainSettings, world_size: int, count_tokens: Callable[[int], int]
) -> None:
    """Choose the micro batch that is started from, which must fit into the global batch: less if no more fits."""
    share = choices.values["global_batch_size"] // world_size
    micro, source = choices.find(train, "micro_batch_size")
    if micro == "auto" or share % micro:
        packing = choices.values["packing"]
        why = "auto: as many as" if packing else f"auto: up to {_MAX_AUTO_PADDED_SEQUENCES}, as far as they"
        why += f" never have more than {_MAX_AUTO_MICRO_BATCH_TOKENS:,} tokens, or 1"
        source = why if micro == "auto" else f"{why}; {source} names {micro}, which doesn't divide {share}"
        micro = choose_micro_batch_size(share, count_tokens, packing=packing)
    choices.put("micro_batch_size", micro, source)


def choose_micro_batch_size(sequences_per_process: int, count_tokens: Callable[[int], int], *, packing: bool) -> int:
    """Return the largest divisor of a process's share of the global batch that stays within the limits.

    `count_tokens` says how many the largest micro batch of so many sequences has.
    """
    most = sequences_per_process if packing else min(sequences_per_process, _MAX_AUTO_PADDED_SEQUENCES)
    sizes = (size for size in range(most, 1, -1) if sequences_per_process % size == 0)
    return next((size for size in sizes if count_tokens(size) <= _MAX_AUTO_MICRO_BATCH_TOKENS), 1)


def _name_split(train: TrainSettings, world_size: int) -> str:
    shown = f"{world_size} process{'es' if world_size > 1 else ''}"
    return shown if train.micro_batch_size == "auto" else f"{shown} in micro batches of {train.micro_batch_size}"
