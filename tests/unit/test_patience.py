"""Waiting for a store that is out of reach."""

import time

import pytest

from job import patience
from job.errors import ConfigError, TakenOverError, UnavailableError


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, on a clock that stands still but for them."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(made))
    return made


def fail(*errors: Exception) -> str:
    left = list(errors)

    def act() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return patience.insist(act)


def test_pauses_grow_and_are_never_shorter_than_asked_for(pauses: list[float]) -> None:
    away = UnavailableError("away")
    assert fail(away, away, UnavailableError("busy", retry_after_s=90), away) == "done"
    assert pauses == [2, 4, 90, 60]


def test_patience_ends(pauses: list[float]) -> None:
    with pytest.raises(UnavailableError, match="busy"):
        fail(*[UnavailableError("busy", retry_after_s=200)] * 3)
    assert pauses == [200, 100]


def test_it_begins_with_the_first_failure(pauses: list[float]) -> None:
    def act() -> str:
        if len(pauses) == 0:
            pauses.append(1000)  # a long upload
            raise UnavailableError("away")
        return "done"

    assert patience.insist(act) == "done"


def test_what_waiting_does_not_mend_ends_at_once(pauses: list[float]) -> None:
    with pytest.raises(ConfigError):
        fail(ConfigError("wrong"))
    assert pauses == []


def test_another_job_in_the_slot_is_not_waited_for(pauses: list[float]) -> None:
    with pytest.raises(TakenOverError):
        fail(TakenOverError("taken over"))
    assert pauses == []
