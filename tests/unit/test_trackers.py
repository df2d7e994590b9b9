"""Trackers learn what is logged, in order; one that fails or hangs costs the run a warning, and no time."""

import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from job.errors import DivergedError
from job.plan import TrainPlan
from job.train import trackers
from job.train.trackers import Trackers


class Listening(TrainerCallback):  # type: ignore[misc]
    """Keeps what it is told."""

    told: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.told.clear()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        self.told.append(model.config.to_dict()["lora_r"])

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any, **_: Any) -> None:
        self.told.append((state.global_step, logs))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.told.append("end")


class Failing(Listening):
    def on_log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to https://me:secret@host")


class Hanging(Listening):
    def on_log(self, *_: Any, **__: Any) -> None:
        threading.Event().wait()


@pytest.fixture
def report(plan_for: Callable[..., TrainPlan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    def report_to(*kinds: type[TrainerCallback], error: Exception | None = None) -> float:
        """Train two steps in words, and return how long that took."""
        by_name = {kind.__name__: kind for kind in kinds}
        monkeypatch.setattr(
            trackers, "get_reporting_integration_callbacks", lambda names: [by_name[name] for name in names]
        )
        monkeypatch.setattr(trackers, "_CLOSE_S", 0.5)
        began_s = time.monotonic()
        with Trackers(plan_for(), list(by_name)) as reported:
            state: Any = TrainerState()
            args: Any = None
            reported.on_train_begin(args, state, TrainerControl())
            reported.log({"step": 0, "eval_loss": 3.0})
            state.global_step = 99  # the Trainer's own goes on
            reported.log({"step": 2, "loss": 2.5})
            if error is not None:
                raise error
        return time.monotonic() - began_s

    return report_to


def test_a_tracker_is_told_all_in_order(report: Callable[..., float], caplog: pytest.LogCaptureFixture) -> None:
    report(Listening)
    assert Listening.told == [16, (0, {"eval_loss": 3.0}), (2, {"loss": 2.5}), "end"]
    assert not caplog.messages


def test_a_failing_one_is_left_out(report: Callable[..., float], caplog: pytest.LogCaptureFixture) -> None:
    report(Failing)
    [warning] = caplog.messages
    assert warning == "Failing is not reported to any more: ConnectionError: no route to https://me:secret@host"


def test_a_hanging_one_is_not_waited_for(report: Callable[..., float], caplog: pytest.LogCaptureFixture) -> None:
    assert report(Hanging) < 5
    assert [message.split(":")[0] for message in caplog.messages] == ["Hanging takes too long"]


def test_an_error_of_the_training_stays_what_it_is(report: Callable[..., float]) -> None:
    with pytest.raises(DivergedError, match="loss nan"):
        report(Listening, error=DivergedError("loss nan"))
    assert Listening.told[-1] == "end"
