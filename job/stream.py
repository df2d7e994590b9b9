"""The order in which a run learns its rows: one shuffled pass after the other, cut at its last step.

Step s learns from positions s * global_batch_size onwards, however many processes share them; the last step is filled
from the next pass. Each micro batch is of consecutive positions.

numpy is imported where it is used: it starts threads, and a worker, which imports the plan's module, must have blocked
SIGTERM before there are any. Else the signal ends the worker before it has saved its checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_MOST_POSITIONS = 20_000_000  # that are looked at: some seconds, and 160 MB


def iterate_stream(rows: int, start: int, stop: int, *, seed: int) -> "Iterator[np.ndarray]":
    """Yield the rows at the positions from `start` to `stop` (exclusive) pass by pass, each int64 (N,)."""
    import numpy as np

    for number in range(start // rows, -(-stop // rows)):
        order = np.random.default_rng([seed, number]).permutation(rows)
        position = number * rows  # of this pass
        yield order[max(0, start - position) : stop - position]


def micro_batch_counter(plan: Mapping[str, Any], lengths: "np.ndarray | None") -> Callable[[int], int]:
    """Return a function that says, of micro batches of so many rows, how many tokens the largest one of a run has.

    `plan` has TrainPlan's values but those of the micro batch; `lengths` (N,) are the tokens of each training row.
    Padded rows, rows whose lengths aren't known (None) and those of a very long run count as the longest allowed.
    """
    import numpy as np

    stop = plan["steps"] * plan["global_batch_size"]
    if lengths is None or not plan["packing"] or stop > _MOST_POSITIONS:
        return lambda size: size * int(plan["max_length_tokens"])
    passes = [lengths[order] for order in iterate_stream(len(lengths), 0, stop, seed=plan["seed"])]
    by_position = np.concatenate(passes)
    return lambda size: int(by_position.reshape(-1, size).sum(axis=1).max())
