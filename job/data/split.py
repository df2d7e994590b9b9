"""Which rows are trained on, and how long they may be: pure functions over token counts."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from job.errors import DataError

if TYPE_CHECKING:
    from job.data.prepare import TokenizedData

Truncation = Literal["drop", "split", "keep_start"]

LENGTH_STEP_TOKENS = 64
AUTO_EVAL_MIN_ROWS = 50
AUTO_EVAL_MAX_ROWS = 500


class Selection(NamedTuple):
    """Rows that fit: their indices (K,) int64, ascending, and what became of the longer ones."""

    indices: NDArray[np.int64]
    dropped_too_long: int
    truncated: int
    dropped_unsupervised: int


def choose_max_length(lengths_tokens: NDArray[np.int64], context_tokens: int) -> int:
    """Return the length that holds 99 % of the rows, rounded up to a multiple of 64, within the model's context."""
    if len(lengths_tokens) == 0:
        raise DataError("there are no rows to choose a maximum length from")
    most = int(np.percentile(lengths_tokens, 99, method="higher"))
    rounded = -(-most // LENGTH_STEP_TOKENS) * LENGTH_STEP_TOKENS
    return min(rounded, context_tokens)


def select_rows(data: "TokenizedData", *, max_length: int, truncation: Truncation) -> Selection:
    """Choose the rows to keep when a row may have at most `max_length` tokens.

    `drop` leaves longer rows out; `keep_start` keeps their first `max_length` tokens, unless none of those is
    supervised.
    """
    too_long = data.lengths_tokens > max_length
    if truncation == "drop":
        return Selection(np.flatnonzero(~too_long), int(too_long.sum()), 0, 0)
    unsupervised = too_long & (data.first_supervised >= max_length)
    return Selection(np.flatnonzero(~unsupervised), 0, int((too_long & ~unsupervised).sum()), int(unsupervised.sum()))


def split_rows(
    indices: NDArray[np.int64], *, fraction: float | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into (training, evaluation), disjoint, both ascending, the same for the same seed.

    `fraction` None: a tenth, at most 500 rows, and none where there are fewer than 50. A fraction above 0 gives at
    least one evaluation row and leaves at least one to train on.
    """
    count = len(indices)
    if fraction is None:
        eval_rows = min(count // 10, AUTO_EVAL_MAX_ROWS) if count >= AUTO_EVAL_MIN_ROWS else 0
    elif fraction > 0:
        eval_rows = min(max(round(count * fraction), 1), max(count - 1, 0))
    else:
        eval_rows = 0
    shuffled = np.random.default_rng(seed).permutation(np.asarray(indices, dtype=np.int64))
    return np.sort(shuffled[eval_rows:]), np.sort(shuffled[:eval_rows])
