"""What the held-out rows say of a run: losses before and after, how sure the difference is, and answers to read."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict


class RowLoss(BaseModel):
    """A held-out row's mean loss, in nats per supervised token, with the base model and with the adapter.

    `line` is where the row came from, "eval.jsonl:12".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: str
    supervised_tokens: int
    loss_base: float
    loss: float


class LossChange(BaseModel):
    """Losses over all held-out rows, and their difference with its 95 % interval (paired bootstrap over rows)."""

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
        """The base model's perplexity."""
        return math.exp(self.loss_base)

    @property
    def perplexity(self) -> float:
        """The perplexity with the adapter."""
        return math.exp(self.loss)


class Sample(BaseModel):
    """One prompt with the answers before and after training, and the one that was hoped for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[dict[str, Any]] | None
    prompt: str
    reference: str | None
    before: str | None
    after: str | None


class Evaluation(BaseModel):
    """All that was found out on held-out rows; `problems` say why something is missing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: LossChange | None
    rows: list[RowLoss]
    samples: list[Sample]
    problems: list[str]
