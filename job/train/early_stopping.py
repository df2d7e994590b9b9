"""Early stopping: the held-out loss is watched while training, and the best weights are kept."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.log import logger


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Evaluates every `interval_steps` and at the last step, keeps the best trained weights in host memory, and stops
    when the loss has not fallen for `patience` evaluations.

    `evaluate` must return the same number on every rank, so that all stop together, and draw no random numbers, so
    that watching changes nothing. `gather` returns copies of the trained weights. `record` is told each step with its
    loss.
    """

    def __init__(
        self,
        *,
        interval_steps: int,
        patience: int,
        evaluate: Callable[[], float],
        gather: Callable[[], dict[str, torch.Tensor]],
        record: Callable[[int, float], None],
    ) -> None:
        self.best_step = 0
        self.best_loss = float("inf")
        self.best_weights: dict[str, torch.Tensor] = {}
        self.stopped_early = False
        self._interval_steps = interval_steps
        self._patience = patience
        self._evaluate = evaluate
        self._gather = gather
        self._record = record
        self._without_progress = 0  # evaluations since the best one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate when it is time to."""
        step = state.global_step
        if step % self._interval_steps and step != state.max_steps:
            return
        loss = self._evaluate()
        self._record(step, loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._without_progress = loss, step, 0
            self.best_weights = self._gather()
            return
        self._without_progress += 1
        if self._without_progress == self._patience and step != state.max_steps:
            logger.info(
                "stopping at step %d of %d: the held-out loss has not fallen since step %d",
                step,
                state.max_steps,
                self.best_step,
            )
            self.stopped_early = True
            control.should_training_stop = True
            control.should_log = True  # the last step, whatever the logging interval
