"""What a node knows of the others: written by the thread that talks to them, read by the one that runs the job."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.errors import InternalError, JobError, UnavailableError

_HINT = "see its log, and what lies between the nodes; start all of them again"


class AttemptEndedError(Exception):
    """Another node's attempt at training has ended in a way that this run survives: all end theirs, and go on together.

    No JobError, for whoever starts an attempt must handle it: see `Peers.interrupt`.
    """


@dataclass(frozen=True)
class Path:
    """How this node reaches the others: the address of node 0 as seen from here, and this end's own."""

    first_address: str
    own_address: str


class Board:
    """State shared by two threads; every change wakes whoever waits."""

    def __init__(self, missing: set[int]) -> None:
        self.missing = missing
        self.path: Path | None = None  # once all have met
        self.reason = ""  # why a node isn't here yet, as far as it is known
        self.first_is_done = False
        self._failure: JobError | None = None
        self._values: dict[int, list[Any]] = {}
        self._interrupted: dict[int, str] = {}
        self._changed = threading.Condition()

    def note(self, *, missing: set[int] | None = None, reason: str | None = None) -> None:
        """Note who is missing while nodes meet, and why."""
        with self._changed:
            self.missing = self.missing if missing is None else missing
            self.reason = self.reason if reason is None else reason

    def meet(self, path: Path) -> None:
        """Note that all are here."""
        with self._changed:
            self.missing, self.path = set(), path
            self._changed.notify_all()

    def put_values(self, round_: int, values: list[Any]) -> None:
        """Note what all nodes gave to an exchange."""
        with self._changed:
            self._values[round_] = values
            self._changed.notify_all()

    def interrupt(self, node: int, round_: int, text: str) -> None:
        """Note that a node's attempt has ended."""
        with self._changed:
            self._interrupted[round_] = f"node {node}: {text}"
            self._changed.notify_all()

    def finish(self) -> None:
        """Note that node 0 has ended well."""
        with self._changed:
            self.first_is_done = True
            self._changed.notify_all()

    def fail(self, failure: JobError) -> None:
        """Note why the run can't go on; the first reason is the cause, and stays."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def fail_by(self, node: int, text: str) -> None:
        """Note that a node has ended, or is lost."""
        self.fail(UnavailableError(f"node {node} {text}", hint=_HINT))

    def crash(self, error: Exception) -> None:
        """Note that the thread itself has failed."""
        self.fail(InternalError(f"talking to the other nodes failed: {type(error).__name__}: {error}"))

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self._failure is not None:
            raise self._failure

    def check_round(self, round_: int) -> None:
        """Raise AttemptEndedError when a node's attempt of this round has ended, or the failure."""
        self.check()
        if round_ in self._interrupted:
            raise AttemptEndedError(self._interrupted[round_])

    def wait(self, is_so: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until something is so; say whether it is. Raises the failure that comes before."""
        with self._changed:
            self._changed.wait_for(lambda: is_so() or self._failure is not None, timeout=timeout_s)
        if is_so():
            return True
        self.check()
        return False

    def has_values(self, round_: int) -> bool:
        """Say whether all nodes have given to an exchange."""
        return round_ in self._values

    def take_values(self, round_: int) -> list[Any]:
        """Return what all nodes gave to an exchange, once."""
        with self._changed:
            return self._values.pop(round_)

    def wait_for_trouble(self, round_: int, timeout_s: float) -> None:
        """Raise what `check_round` raises as soon as there is something; return when nothing came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or round_ in self._interrupted, timeout=timeout_s)
        self.check_round(round_)
