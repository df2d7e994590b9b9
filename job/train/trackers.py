"""Reports to TensorBoard, MLflow and Weights & Biases, through the callbacks that transformers' `report_to` stands for.

The Trainer would call them after every step and wait for them. Here each has a thread of its own, which is told what
stands in metrics.jsonl and nothing else: a tracker that fails or hangs costs the run a warning, and no time.
"""

import copy
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from job.errors import PreemptedError
from job.log import logger
from job.plan import TrainPlan

_CLOSE_S = 20.0  # for what is still to be sent when training has ended
_CLOSE_STOPPED_S = 3.0  # of a grace period, which is needed for other things
_NO_PARAMETERS = {"sources", "memory", "warnings"}

_Act = Callable[[TrainerCallback], object]


class Trackers(TrainerCallback):  # type: ignore[misc]
    """The trackers of these names, as a context: leaving it says how training has ended, and waits for what is still to
    be sent, but not long."""

    def __init__(self, plan: TrainPlan, names: Sequence[str]) -> None:
        self._trackers = [_Tracker(name) for name in names]
        self._model = _Parameters(plan)
        self._began: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin a run in each tracker."""
        self._began = began = (args, copy.copy(state), copy.copy(control))
        for tracker in self._trackers:
            tracker.start()
            tracker.tell(lambda callback: callback.on_train_begin(*began, model=self._model))

    def log(self, record: dict[str, float]) -> None:
        """Report what was logged of a step: numbers by name, and the "step" itself."""
        if self._began is None:
            return
        args, begun, control = self._began
        state = copy.copy(begun)
        state.global_step = int(record["step"])
        logs = {name: value for name, value in record.items() if name != "step"}
        for tracker in self._trackers:
            tracker.tell(lambda callback: callback.on_log(args, state, control, logs=dict(logs), model=self._model))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._began is None:
            return
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, PreemptedError) else "FAILED"
        deadline_s = time.monotonic() + (_CLOSE_STOPPED_S if status == "KILLED" else _CLOSE_S)
        for tracker in self._trackers:
            tracker.end(status)
        for tracker in self._trackers:
            tracker.join(max(0.0, deadline_s - time.monotonic()))
            if tracker.is_alive():
                logger.warning("%s takes too long: what it was not told yet is lost to it", tracker.name)


class _Parameters:
    """Stands where the callbacks expect the model: they make its configuration the run's parameters, and here that is
    the plan."""

    def __init__(self, plan: TrainPlan) -> None:
        self._values = plan.model_dump(mode="json", exclude=_NO_PARAMETERS)
        self.config = self

    def to_dict(self) -> dict[str, Any]:
        return self._values

    def to_json_string(self) -> str:
        return json.dumps(self._values, indent=2)

    def num_parameters(self) -> int:
        raise AttributeError  # which the callback takes for an answer


class _Tracker(threading.Thread):
    """One tracker, and the thread in which all is done that concerns it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._acts: queue.SimpleQueue[_Act | None] = queue.SimpleQueue()
        self._status = "FINISHED"

    def tell(self, act: _Act) -> None:
        self._acts.put(act)

    def end(self, status: str) -> None:
        self._status = status
        self._acts.put(None)

    def run(self) -> None:
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every try
        try:
            [kind] = get_reporting_integration_callbacks([self.name])
            callback = kind()
            for act in iter(self._acts.get, None):
                act(callback)
            self._finish(callback)
        except Exception as error:  # noqa: BLE001 - of any library, and none may end the training
            reason = (str(error).splitlines() or [""])[0]
            logger.warning("%s is not reported to any more: %s: %s", self.name, type(error).__name__, reason)

    def _finish(self, callback: TrainerCallback) -> None:
        """Send what is left, and say how it ended: at the end of a process that is not left to end by itself."""
        if self.name == "mlflow":
            import mlflow

            mlflow.flush_async_logging()
            mlflow.end_run(self._status)
        elif self.name == "wandb":
            import wandb

            wandb.finish(exit_code=0 if self._status == "FINISHED" else 1)
        else:
            callback.on_train_end(None, None, None)
