"""Early stopping: the held-out loss is watched while training, and the best weights are kept."""

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict

from job.log import logger


class StoppingState(BaseModel):
    """What early stopping knows after some step; the best weights belong to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    best_step: int
    best_loss: float | None  # None before the first evaluation
    without_progress: int


class EarlyStopping:
    """Evaluates every `interval_steps` and at the last of all `steps`, keeps the best trained weights in host memory,
    and says when the loss has not fallen for `patience` evaluations.

    `evaluate` must return the same number on every rank, so that all stop together, and draw no random numbers, so
    that watching changes nothing. `gather` returns copies of the trained weights. `record` is told each step with its
    loss.
    """

    def __init__(
        self,
        *,
        steps: int,
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
        self._steps = steps
        self._interval_steps = interval_steps
        self._patience = patience
        self._evaluate = evaluate
        self._gather = gather
        self._record = record
        self._without_progress = 0  # evaluations since the best one
        self._evaluated_step = 0

    def go_on_from(self, state: StoppingState, best_weights: dict[str, torch.Tensor]) -> None:
        """Go on from what `read_state` returned, and from the weights that were the best until then."""
        self.best_step = state.best_step
        self.best_loss = float("inf") if state.best_loss is None else state.best_loss
        self.best_weights = best_weights
        self._without_progress = state.without_progress

    def read_state(self) -> StoppingState:
        """Return the state, as of now."""
        best_loss = self.best_loss if self.best_weights else None
        return StoppingState(best_step=self.best_step, best_loss=best_loss, without_progress=self._without_progress)

    def is_over(self, step: int) -> bool:
        """Evaluate after a step, when it is time to, and return whether training should end here, before its time."""
        if step % self._interval_steps and step != self._steps:
            return False
        self.evaluate(step)
        if self._without_progress == self._patience and step != self._steps:
            logger.info(
                "stopping at step %d of %d: the held-out loss has not fallen since step %d",
                step,
                self._steps,
                self.best_step,
            )
            self.stopped_early = True
        return self.stopped_early

    def evaluate(self, step: int) -> None:
        """Evaluate after a step, unless that is done, and keep the weights if they are the best so far."""
        if step == self._evaluated_step:
            return
        self._evaluated_step = step
        loss = self._evaluate()
        self._record(step, loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._without_progress = loss, step, 0
            self.best_weights = self._gather()
        else:
            self._without_progress += 1
