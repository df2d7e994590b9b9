"""The metrics of a run: what each step has learned and how fast, looked at by all ranks and written down by rank 0: in
metrics.jsonl, in the log, on the terminal's progress line, and by the trackers."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import BaseModel, ConfigDict

from job.errors import DivergedError
from job.handover import RunFolder, WorkerInputs, write_whole
from job.log import event, format_bytes, format_duration, logger
from job.phases import enter_phase
from job.plan import TrainPlan
from job.progress_line import ProgressLine
from job.train.dataset import StreamSampler, TokenRows
from job.train.divergence import SPIKE_WINDOW_STEPS, has_diverged, has_exploded, is_spike
from job.train.peak_memory import own_peak_bytes


class MetricsState(BaseModel):
    """What the metrics of a run are made of, after some step: the time that training took, the sum of all steps'
    losses, the last of them, those since the last one that was logged, with the time that they took and waited for
    rows, and the logged ones."""

    model_config = ConfigDict(extra="forbid")

    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    last_losses: list[float] = []
    unlogged_losses: list[float] = []
    unlogged_s: float = 0.0
    unlogged_wait_s: float = 0.0
    logged_losses: list[float] = []
    warned_step: int | None = None  # of a loss spike


@dataclass(frozen=True)
class _Step:
    number: int
    grad_norm: float
    learning_rate: float
    tokens_per_second: float


class StepMetrics:
    """Writes metrics.jsonl and the log, from rank 0, and ends the run on all ranks when a loss leaves the numbers.

    All ranks must be told the same losses. `track` is told what is written down, by rank 0 alone: every line of
    metrics.jsonl, and the held-out loss before and after.
    """

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        *,
        rank: int,
        rows: TokenRows,
        inputs: WorkerInputs,
        track: Callable[[dict[str, float]], None],
    ) -> None:
        self.saved_step: int | None = None  # of the newest checkpoint
        self._plan = plan
        self._folder = folder
        self._is_writer = rank == 0
        self._rows = rows
        self._names = inputs.train_names
        self._track = track
        self._progress = ProgressLine(is_wanted=self._is_writer and inputs.log_format == "text")
        self._tokens_by_step = rows.lengths()[_order_by_step(plan)].sum(axis=1).cumsum()  # (steps,)
        self._started_s = self._step_began_s = time.monotonic()
        self._state = MetricsState()
        self._last = _Step(0, 0.0, 0.0, 0.0)

    def go_on_from(self, state: MetricsState, written: Path, eval_loss_base: float | None) -> None:
        """Go on from what `read_state` returned, and from what was written until then."""
        self._state = state
        if self._is_writer:
            shutil.copyfile(written, self._folder.metrics)
            self._keep_base(eval_loss_base)

    def read_state(self) -> MetricsState:
        """Return a copy of the state, as of now."""
        return self._state.model_copy(deep=True, update={"elapsed_s": self._elapsed_s()})

    def start_clock(self) -> None:
        """Say that the first step begins."""
        self._started_s = time.monotonic() - self._state.elapsed_s
        self._step_began_s = time.monotonic()
        enter_phase("first step")

    def begin_step(self) -> None:
        """Say that the next step begins, with its rows: what took place since the last one is no part of either."""
        self._step_began_s = time.monotonic()
        enter_phase("steps")

    def note_wait(self, wait_s: float) -> None:
        """Count time that training waited for rows."""
        self._state.unlogged_wait_s += wait_s

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
        state.unlogged_s += time.monotonic() - self._step_began_s
        self._last = _Step(step, grad_norm, learning_rate, self._measure_speed(step))
        diverged = has_diverged(loss, grad_norm, self._plan.dtype)
        if diverged or step in (1, self._plan.steps) or step % self._plan.logging_steps == 0:
            self.log_last_step()
        if diverged:
            self._raise_diverged(step, loss, grad_norm, learning_rate)
        self._draw(loss)
        self._warn_of_spike(step, loss)
        state.last_losses = [*state.last_losses, loss][-SPIKE_WINDOW_STEPS:]

    def log_last_step(self) -> None:
        """Write down the last step, whatever the interval, unless it is."""
        state = self._state
        if not state.unlogged_losses:
            return
        steps = len(state.unlogged_losses)
        mean = sum(state.unlogged_losses) / steps
        if self._is_writer:
            self._write(self._last, mean, step_s=state.unlogged_s / steps, data_wait_s=state.unlogged_wait_s / steps)
        state.logged_losses.append(mean)
        state.unlogged_losses, state.unlogged_s, state.unlogged_wait_s = [], 0.0, 0.0

    def announce_base(self, loss: float) -> None:
        """Say what the base model's held-out loss is."""
        if self._is_writer:
            self._keep_base(loss)
            self._say_evaluation(0, loss, "held-out loss of the base model: %.4f", loss)

    def announce_result(self, step: int, before: float, after: float) -> None:
        """Say what the held-out loss is after the last step."""
        if self._is_writer:
            self._say_evaluation(step, after, "held-out loss: %.4f before, %.4f after", before, after)

    def record_evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss after a step.

        Raises DivergedError when it is no number; on every rank alike, since all ranks evaluate to the same loss.
        """
        if self._is_writer:
            self._append({"step": step, "eval_loss": loss})
            self._say_evaluation(step, loss, "step %d/%d  held-out loss %.4f", step, self._plan.steps, loss)
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

    def _measure_speed(self, step: int) -> float:
        """Return the tokens a second since the last line."""
        steps = len(self._state.unlogged_losses)
        tokens = self._count_tokens(step) - (self._count_tokens(step - steps) if step > steps else 0)
        return tokens / self._state.unlogged_s

    def _draw(self, loss: float) -> None:
        last, total = self._last, self._plan.steps
        if last.number == total:
            self._progress.clear()
        elif self._progress.is_due():
            self._progress.draw(
                f"step {last.number}/{total}  loss {loss:.4f}  {last.tokens_per_second:.0f} tokens/s  "
                f"{format_duration(self._estimate_left_s(last.number))} left  "
                f"{format_bytes(own_peak_bytes(self._plan))} at most"
            )

    def _estimate_left_s(self, step: int) -> float:
        return self._elapsed_s() / step * (self._plan.steps - step)

    def _keep_base(self, loss: float | None) -> None:
        if loss is not None:
            write_whole(self._folder.eval_loss_base, json.dumps(loss))

    def _say_evaluation(self, step: int, loss: float, message: str, *words: float) -> None:
        logger.info(message, *words, extra=event("evaluation", step=step, total_steps=self._plan.steps, eval_loss=loss))
        self._track({"step": step, "eval_loss": loss})

    def _write(self, last: _Step, loss: float, *, step_s: float, data_wait_s: float) -> None:
        step, elapsed_s, tokens = last.number, self._elapsed_s(), self._count_tokens(last.number)
        record = {
            "step": step,
            "epoch": round(step * self._plan.global_batch_size / self._plan.train_rows, 4),
            "loss": loss,
            "grad_norm": last.grad_norm,
            "learning_rate": last.learning_rate,
            "tokens": tokens,
            "tokens_per_second": round(last.tokens_per_second, 1),
            "step_s": round(step_s, 6),
            "data_wait_s": round(data_wait_s, 6),
            "elapsed_s": round(elapsed_s, 3),
            "memory_bytes": own_peak_bytes(self._plan),
        }
        self._append(record)
        self._track(record)
        left_s = self._estimate_left_s(step)
        logger.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s  %.0f s left",
            step,
            self._plan.steps,
            loss,
            last.grad_norm,
            last.learning_rate,
            last.tokens_per_second,
            left_s,
            extra=event("step", **record, total_steps=self._plan.steps, eta_s=round(left_s, 1)),
        )

    def _append(self, record: dict[str, float]) -> None:
        # NaN isn't JSON
        finite = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
        with self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _order_by_step(plan: TrainPlan) -> np.ndarray:
    """Return the indices of the segments that each step learns from, int64 (steps, global batch)."""
    sampler = StreamSampler(plan.train_rows, steps=plan.steps, global_batch_size=plan.global_batch_size, seed=plan.seed)
    return np.fromiter(sampler, dtype=np.int64).reshape(plan.steps, -1)
