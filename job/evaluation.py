"""What a run has changed, in figures and in words: the held-out loss of base model and adapter, row by row, with an
interval of the difference, and answers before and after. It is published as `evaluation.json`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np

_RESAMPLES = 10_000
_MOST_DRAWS = 200_000_000  # of rows, in all resamples: from 20,000 rows on fewer resamples do, which differ less
_DRAWS_AT_ONCE = 1_000_000
_SEED = 0
FEW_ROWS = 10  # a bootstrap over fewer hardly knows how rows differ


class RowLoss(BaseModel):
    """The held-out loss of one row, which stands at `line` ("eval.jsonl:12"): mean nats per supervised token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: str
    supervised_tokens: int
    loss_base: float
    loss: float


class LossChange(BaseModel):
    """The held-out loss of the base model and of the adapter: mean nats per supervised token of all rows.

    `change` is the second less the first; `change_low` and `change_high` are the ends of its 95 % interval, by a
    paired bootstrap over rows (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    supervised_tokens: int
    loss_base: float
    loss: float
    change: float
    change_low: float
    change_high: float

    @property
    def perplexity_base(self) -> float:
        """That of the base model: how many tokens it seems to choose among."""
        return find_perplexity(self.loss_base)

    @property
    def perplexity(self) -> float:
        """That of the adapter."""
        return find_perplexity(self.loss)

    def describe(self) -> str:
        """Return perplexities and interval in words."""
        rows = f"{self.rows:,} row{'s' if self.rows > 1 else ''}"
        return (
            f"perplexity {self.perplexity_base:.4g} before, {self.perplexity:.4g} after; the loss changed by "
            f"{self.change:+.4f} (95 % interval {self.change_low:+.4f} to {self.change_high:+.4f}, {rows})"
        )

    def doubt(self) -> str | None:
        """Return why the adapter can't be taken for better than the base model, in words, or None where it can."""
        if self.change_low > 0:
            return "the adapter is worse than the base model on the held-out rows"
        if self.change_high >= 0:
            return "the held-out loss may have changed by chance: the interval of the difference includes 0"
        if self.rows < FEW_ROWS:
            rows = f"{self.rows} held-out rows are" if self.rows > 1 else "one held-out row is"
            return f"{rows} too few to tell what others are like, whatever the interval says"
        return None


class Sample(BaseModel):
    """A prompt, with greedy answers of the base model (`before`) and of the adapter (`after`), None where there was no
    time or no memory for one.

    `prompt` is the text that the model was given, special tokens included; `messages` the conversation that it was made
    of, where it was; `reference` the answer in the data, for a prompt from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[dict[str, Any]] | None
    prompt: str
    reference: str | None
    before: str | None
    after: str | None


class Evaluation(BaseModel):
    """All of it. `problems` says why something is missing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: LossChange | None = None
    rows: list[RowLoss] = []
    samples: list[Sample] = []
    problems: list[str] = []


def read_evaluation(path: Path) -> Evaluation:
    """Read what the workers have written down so far, which may be nothing."""
    return Evaluation.model_validate_json(path.read_bytes()) if path.exists() else Evaluation()


def find_perplexity(loss: float) -> float:
    """Return e to the power of a loss, in nats per token; the largest number there is where it is larger."""
    return math.exp(min(loss, 700.0))


def compare_losses(rows: Sequence[RowLoss]) -> LossChange:
    """Return what at least one row says of the adapter."""
    import numpy as np

    tokens = np.array([row.supervised_tokens for row in rows], dtype=np.float64)  # (N,)
    before = tokens * [row.loss_base for row in rows]
    after = tokens * [row.loss for row in rows]
    low, high = find_interval(after - before, tokens)
    total = tokens.sum()
    return LossChange(
        rows=len(rows),
        supervised_tokens=int(total),
        loss_base=float(before.sum() / total),
        loss=float(after.sum() / total),
        change=float((after - before).sum() / total),
        change_low=low,
        change_high=high,
    )


def find_interval(changes: "np.ndarray", tokens: "np.ndarray") -> tuple[float, float]:
    """Return the ends of the 95 % interval of the mean change per token, given each row's change, summed over its
    tokens, and how many these are: float64 (N,) each.

    Whole rows are drawn, since the tokens of one are alike. The same rows give the same interval. With few rows it is
    too narrow, and with one it is a point.
    """
    import numpy as np

    generator = np.random.default_rng(_SEED)
    rows = len(changes)
    resamples = min(_RESAMPLES, max(1, _MOST_DRAWS // rows))
    at_once = max(1, _DRAWS_AT_ONCE // rows)
    means = []
    for done in range(0, resamples, at_once):
        drawn = generator.integers(rows, size=(min(at_once, resamples - done), rows), dtype=np.int32)
        means.append(changes[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
