"""The order in which a run learns its rows: one shuffled pass after the other, cut at its last step.

Step s learns from positions s * global_batch_size onwards, however many processes share them; the last step is filled
from the next pass. Which rows of a step make a micro batch depends on their lengths.

numpy is imported where it is used: it starts threads, and a worker, which imports the plan's module, must have blocked
SIGTERM before there are any. Else the signal ends the worker before it has saved its checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_MOST_POSITIONS = 20_000_000  # that are looked at: some seconds, and 160 MB
_MOST_ROWS = 20_000  # of a step that is looked at: dealing out takes the longer, the more there are
_POSITIONS_AT_A_TIME = 1_000_000  # are dealt out: 90 MB
_FULL = 2**40  # more tokens than a micro batch has


def iterate_stream(rows: int, start: int, stop: int, *, seed: int) -> "Iterator[np.ndarray]":
    """Yield the rows at the positions from `start` to `stop` (exclusive) pass by pass, each int64 (N,)."""
    import numpy as np

    for number in range(start // rows, -(-stop // rows)):
        order = np.random.default_rng([seed, number]).permutation(rows)
        position = number * rows  # of this pass
        yield order[max(0, start - position) : stop - position]


def deal_rows(tokens: "np.ndarray", size: int, *, processes: int, is_joined: bool) -> "np.ndarray":
    """Return the order in which the rows of S steps are dealt out to the processes, a micro batch of `size` to each in
    turn: positions within the steps (S, G), given the rows' tokens (S, G).

    All processes get about as many tokens, for each waits for the others at the end of a step; and so do all micro
    batches of a process, for the largest one decides what fits. Both by the rule that the longest row is next, and goes
    to where the fewest tokens are so far (Graham, Bounds on Multiprocessing Timing Anomalies, 1969). Rows that are
    padded come together with those of about their length.
    """
    import numpy as np

    steps, rows = tokens.shape
    if rows == size:
        return np.broadcast_to(np.arange(rows), tokens.shape)
    order = np.argsort(-tokens, axis=1, kind="stable")
    order, lengths = _spread(order, np.take_along_axis(tokens, order, axis=1), rows // processes)  # (S * P, R)
    if is_joined:
        micro_batches, lengths = _spread(order, lengths, size)
        sums = lengths.sum(axis=1).reshape(len(order), -1)
        largest_first = np.argsort(-sums, axis=1, kind="stable")  # so that all processes have the large ones at a time
        order = np.take_along_axis(micro_batches.reshape(*sums.shape, size), largest_first[:, :, None], axis=1)
    return order.reshape(steps, processes, -1, size).swapaxes(1, 2).reshape(steps, rows)


def _spread(rows: "np.ndarray", lengths: "np.ndarray", size: int) -> "tuple[np.ndarray, np.ndarray]":
    """Return rows (S, G) of S steps, and their lengths (S, G), in groups of about as many tokens, (S * G / size, size)
    of both: what comes longest first does so in each group, too."""
    import numpy as np

    steps, count = rows.shape
    tokens, filled = (np.zeros((steps, count // size), dtype=np.int64) for _ in range(2))
    group = np.empty((steps, count), dtype=np.int64)
    every = np.arange(steps)
    for turn in range(count):
        fewest = group[:, turn] = tokens.argmin(axis=1)
        filled[every, fewest] += 1
        tokens[every, fewest] += lengths[:, turn] + _FULL * (filled[every, fewest] == size)
    order = np.argsort(group, axis=1, kind="stable")
    together, their_lengths = (np.take_along_axis(one, order, axis=1).reshape(-1, size) for one in (rows, lengths))
    return together, their_lengths


def micro_batch_counter(plan: Mapping[str, Any], lengths: "np.ndarray | None") -> Callable[[int], int]:
    """Return a function that says, of micro batches of so many rows, how many tokens the largest one of a run has.

    `plan` has TrainPlan's values but those of the micro batch; `lengths` (N,) are the tokens of each training row.
    Padded rows, rows whose lengths aren't known (None) and those of a very long run, or of very large steps, count as
    the longest allowed.
    """
    import numpy as np

    rows = plan["global_batch_size"]
    stop = plan["steps"] * rows
    if lengths is None or not plan["packing"] or stop > _MOST_POSITIONS or rows > _MOST_ROWS:
        return lambda size: size * int(plan["max_length_tokens"])
    passes = [lengths[order] for order in iterate_stream(len(lengths), 0, stop, seed=plan["seed"])]
    by_step = np.concatenate(passes).reshape(-1, rows)  # (S, G)
    parts = np.split(by_step, range(0, len(by_step), max(1, _POSITIONS_AT_A_TIME // rows))[1:])

    def count_in(part: "np.ndarray", size: int) -> int:
        order = deal_rows(part, size, processes=plan["nodes"] * plan["processes"], is_joined=True)
        return int(np.take_along_axis(part, order, axis=1).reshape(-1, size).sum(axis=1).max())

    return lambda size: max(count_in(part, size) for part in parts)
