"""What is done after each step, in this order: its loss is looked at, the held-out loss is watched, all processes agree
whether to stop or to save, and a checkpoint is saved."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.handover import RunFolder, StopRequest
from job.log import logger
from job.plan import TrainPlan
from job.train.collective import broadcast_text, find_maximum
from job.train.early_stopping import EarlyStopping
from job.train.metrics import StepMetrics


class StepControl(TrainerCallback):  # type: ignore[misc]
    """Ends training, or has it saved, at the same step on all processes.

    `stopped` says that a checkpoint was saved in order to go on from it in another start; `finished_by`, that training
    was to end for this reason as if it were complete. `before_first_step` is called right before the first step.
    """

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        metrics: StepMetrics,
        stopping: EarlyStopping | None,
        *,
        rank: int,
        remember_step: Callable[[int], None],
        save: Callable[[int], None],
    ) -> None:
        self.stopped = False
        self.finished_by: str | None = None
        self.before_first_step: Callable[[], None] = lambda: None
        self._plan = plan
        self._folder = folder
        self._metrics = metrics
        self._stopping = stopping
        self._rank = rank
        self._remember_step = remember_step
        self._save = save
        self._is_first = True
        self._saved_s = 0.0  # by the monotonic clock

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the random numbers of a run that goes on: reading the first rows has drawn some."""
        if self._is_first:
            self._is_first = False
            self._saved_s = time.monotonic()
            self.before_first_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Do what is due after a step, each of which is logged.

        Raises DivergedError, on every rank alike, since the loss in `logs` is the average over all.
        """
        state.log_history.clear()  # the Trainer would keep every step's
        if "loss" not in logs:  # the summary at the end
            return
        step = state.global_step
        self._remember_step(step)
        self._metrics.look_at_step(step, float(logs["loss"]), float(logs["grad_norm"]), float(logs["learning_rate"]))
        if self._stopping is not None and self._stopping.is_over(step):
            self._metrics.log_last_step()
            control.should_training_stop = True
        elif step < self._plan.steps:
            control.should_training_stop = self._stop_or_save(step)
        self._metrics.begin_step()

    def _stop_or_save(self, step: int) -> bool:
        """Return whether training ends here."""
        request = self._read_request()
        wants_stop, wants_finish, is_due, teller = find_maximum(
            [
                int(request is not None and not request.finish),
                int(request is not None and request.finish),
                int(self._is_due(step)),
                0 if request is None else self._rank + 1,
            ],
            self._plan,
        )
        if wants_finish and not wants_stop:
            reason = broadcast_text("" if request is None else request.reason, self._plan, source=teller - 1)
            self._finish(step, reason)
            return True
        if wants_stop or is_due:
            self._save(step)
            self._saved_s = time.monotonic()
        self.stopped = bool(wants_stop)
        return self.stopped

    def _finish(self, step: int, reason: str) -> None:
        self.finished_by = reason
        self._metrics.log_last_step()
        if self._stopping is not None:
            self._stopping.evaluate(step)
        if self._rank == 0:
            schedule = "" if self._plan.scheduler == "constant" else ", so the learning rate has not fallen to its end"
            logger.warning("ending at step %d of %d (%s)%s", step, self._plan.steps, reason, schedule)

    def _read_request(self) -> StopRequest | None:
        path = self._folder.stop_request
        return StopRequest.model_validate_json(path.read_bytes()) if path.exists() else None

    def _is_due(self, step: int) -> bool:
        plan = self._plan
        if plan.checkpoint_every_steps is not None:
            return step % plan.checkpoint_every_steps == 0
        is_time = time.monotonic() - self._saved_s >= 60 * (plan.checkpoint_every_minutes or 0)
        return self._rank == 0 and is_time  # one clock decides
