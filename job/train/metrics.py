"""The metrics of a run: what each step has learned, looked at by all ranks and written down by rank 0."""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import BaseModel, ConfigDict

from job.errors import DivergedError
from job.log import logger
from job.plan import TrainPlan
from job.train.dataset import StreamSampler, TokenRows
from job.train.divergence import SPIKE_WINDOW_STEPS, has_diverged, has_exploded, is_spike


class MetricsState(BaseModel):
    """What the metrics of a run are made of, after some step: the time that training took, the sum of all steps'
    losses, the last of them, those since the last one that was logged, and the logged ones."""

    model_config = ConfigDict(extra="forbid")

    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    last_losses: list[float] = []
    unlogged_losses: list[float] = []
    logged_losses: list[float] = []
    warned_step: int | None = None  # of a loss spike


@dataclass(frozen=True)
class _Step:
    number: int
    grad_norm: float
    learning_rate: float


class StepMetrics:
    """Writes metrics.jsonl and the log, from rank 0, and ends the run on all ranks when a loss leaves the numbers.

    All ranks must be told the same losses.
    """

    def __init__(self, plan: TrainPlan, path: Path, *, rank: int, rows: TokenRows, names: Sequence[str]) -> None:
        self.saved_step: int | None = None  # of the newest checkpoint
        self._plan = plan
        self._path = path
        self._is_writer = rank == 0
        self._rows = rows
        self._names = names
        self._tokens_by_step = rows.lengths()[_order_by_step(plan)].sum(axis=1).cumsum()  # (steps,)
        self._started_s = time.monotonic()
        self._state = MetricsState()
        self._last = _Step(0, 0.0, 0.0)

    def go_on_from(self, state: MetricsState, written: Path) -> None:
        """Go on from what `read_state` returned, and from what was written until then."""
        self._state = state
        if self._is_writer:
            shutil.copyfile(written, self._path)

    def read_state(self) -> MetricsState:
        """Return a copy of the state, as of now."""
        return self._state.model_copy(deep=True, update={"elapsed_s": self._elapsed_s()})

    def start_clock(self) -> None:
        """Say that the first step begins."""
        self._started_s = time.monotonic() - self._state.elapsed_s

    def summarize(self, steps: int) -> dict[str, float | int]:
        """Return how much was learned from in so many steps, by all processes, and how fast."""
        tokens, elapsed_s = self._count_tokens(steps), self._elapsed_s()
        return {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": round(tokens / elapsed_s, 1),
            "train_seconds": round(elapsed_s, 1),
            "train_loss": self._state.loss_sum / steps,
        }

    def look_at_step(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Take in a step, and write it down at the plan's interval, with the mean of the losses since the one before.

        Raises DivergedError when a number of it is none.
        """
        state = self._state
        state.loss_sum += loss
        state.unlogged_losses.append(loss)
        self._last = _Step(step, grad_norm, learning_rate)
        diverged = has_diverged(loss, grad_norm, self._plan.dtype)
        if diverged or step == 1 or step % self._plan.logging_steps == 0:
            self.log_last_step()
        if diverged:
            self._raise_diverged(step, loss, grad_norm, learning_rate)
        self._warn_of_spike(step, loss)
        state.last_losses = [*state.last_losses, loss][-SPIKE_WINDOW_STEPS:]

    def log_last_step(self) -> None:
        """Write down the last step, whatever the interval, unless it is."""
        state = self._state
        if not state.unlogged_losses:
            return
        mean = sum(state.unlogged_losses) / len(state.unlogged_losses)
        state.logged_losses.append(mean)
        state.unlogged_losses = []
        if self._is_writer:
            self._write(self._last, mean)

    def record_evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss after a step.

        Raises DivergedError when it is no number; on every rank alike, since all ranks evaluate to the same loss.
        """
        if self._is_writer:
            self._append({"step": step, "eval_loss": loss})
            logger.info("step %d/%d  held-out loss %.4f", step, self._plan.steps, loss)
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step} of {self._plan.steps}: the held-out loss is {loss}", hint=self._blame_learning_rate()
            )

    def check_not_exploded(self) -> None:
        """Raise DivergedError when the run learned the opposite of what it was shown."""
        losses = self._state.logged_losses
        if has_exploded(losses):
            raise DivergedError(
                f"the loss rose from {losses[0]:.2f} at the first step to {losses[-1]:.2f} at the last",
                hint=self._blame_learning_rate(),
            )

    def _raise_diverged(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        hint = self._blame_learning_rate()
        if step == 1:  # nothing was learned before it
            hint = f"the likeliest cause is a row of this step, or a number beyond SFT_MODEL__DTYPE={self._plan.dtype}"
            hint += ": look at the rows, and try bfloat16" if self._plan.dtype == "float16" else ": look at the rows"
        if self.saved_step is not None:
            hint += f"; the checkpoint after step {self.saved_step}, from before it, stays"
        raise DivergedError(
            f"step {step} of {self._plan.steps}: loss {loss:g}, gradient norm {grad_norm:g}, "
            f"learning rate {learning_rate:.3g}; the rows of this step: {self._describe_rows(step)}",
            hint=hint,
        )

    def _warn_of_spike(self, step: int, loss: float) -> None:
        state = self._state
        is_silent = state.warned_step is not None and step < state.warned_step + SPIKE_WINDOW_STEPS
        if is_silent or not is_spike(loss, state.last_losses):
            return
        state.warned_step = step
        if self._is_writer:
            logger.warning(
                "step %d of %d: the loss jumps to %.2f, where the median of the last %d is %.2f; the rows of this "
                "step: %s; if it doesn't come back, lower SFT_TRAIN__LEARNING_RATE",
                step,
                self._plan.steps,
                loss,
                len(state.last_losses),
                median(state.last_losses),
                self._describe_rows(step),
            )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _count_tokens(self, step: int) -> int:
        return int(self._tokens_by_step[step - 1])

    def _describe_rows(self, step: int) -> str:
        return self._rows.describe(_order_by_step(self._plan)[step - 1], self._names)

    def _blame_learning_rate(self) -> str:
        lower = self._plan.learning_rate / 4
        return f"the likeliest cause is a learning rate that is too high: try SFT_TRAIN__LEARNING_RATE={lower:.2g}"

    def _write(self, last: _Step, loss: float) -> None:
        step, elapsed_s, tokens = last.number, self._elapsed_s(), self._count_tokens(last.number)
        record = {
            "step": step,
            "epoch": round(step * self._plan.global_batch_size / self._plan.train_rows, 4),
            "loss": loss,
            "grad_norm": last.grad_norm,
            "learning_rate": last.learning_rate,
            "tokens": tokens,
            "elapsed_s": round(elapsed_s, 3),
        }
        self._append(record)
        logger.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s  %.0f s left",
            step,
            self._plan.steps,
            loss,
            last.grad_norm,
            last.learning_rate,
            tokens / elapsed_s,
            elapsed_s / step * (self._plan.steps - step),
        )

    def _append(self, record: dict[str, float]) -> None:
        # NaN isn't JSON
        finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _order_by_step(plan: TrainPlan) -> np.ndarray:
    """Return the indices of the segments that each step learns from, int64 (steps, global batch)."""
    sampler = StreamSampler(plan.train_rows, steps=plan.steps, global_batch_size=plan.global_batch_size, seed=plan.seed)
    return np.fromiter(sampler, dtype=np.int64).reshape(plan.steps, -1)
