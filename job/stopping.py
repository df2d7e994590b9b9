"""SIGTERM and SIGINT become an exception in the main thread, which can't get lost.

Python drops an exception that is raised inside a destructor or a fork hook ("Exception ignored in ..."), and a signal
may come at just that moment. So the exception is raised again every few seconds, until `acknowledge_stop` says that the
job is on its way out, and Python's own report of the one that it dropped is left out. A second signal ends the process
at once; the kernel then ends the workers, which are tied to it.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from job.errors import PREEMPTED
from job.log import logger

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SHARE = 0.8  # of the grace period; what is left is for ending processes and saying how it ended
_REMINDER_S = 2.0
_patience_s = 0.0


class StopSignal(BaseException):
    """The job was told to stop. Not an Exception, so that no library takes it for a failure of its own and goes on."""


def raise_on_stop_signals(say_last_words: Callable[[str], None]) -> None:
    """From now on, raise StopSignal in the main thread on SIGTERM and SIGINT; on a second one, say last words with the
    signal's name and end the process."""

    def stop(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        for again in _STOP_SIGNALS:
            signal.signal(again, lambda number, _: _end(signal.Signals(number).name, say_last_words))
        signal.signal(signal.SIGALRM, lambda *_: _raise(name))
        signal.setitimer(signal.ITIMER_REAL, _patience_s or _REMINDER_S, _REMINDER_S)
        if _patience_s:
            logger.info("%s: there are %.0f s left to be done", name, _patience_s)
        else:
            _raise(name)

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)
    sys.unraisablehook = _report_dropped


def be_patient(patience_s: float) -> None:
    """From now on, raise StopSignal only so many seconds after the first signal: what is done by then is done."""
    global _patience_s  # noqa: PLW0603 - signal handlers are the process's, and so is what they do
    _patience_s = patience_s


def stop_in(left_s: float) -> None:
    """Raise StopSignal once more, so many seconds from now, after a first one was caught and is over: what is done by
    then is done."""
    signal.setitimer(signal.ITIMER_REAL, max(left_s, _REMINDER_S), _REMINDER_S)


def acknowledge_stop() -> None:
    """End the reminders: called first where StopSignal is caught, and where cleaning up after it takes its time."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _raise(name: str) -> NoReturn:
    raise StopSignal(name)


def _end(name: str, say_last_words: Callable[[str], None]) -> NoReturn:
    say_last_words(name)
    os._exit(PREEMPTED.code)


def _report_dropped(dropped: "sys.UnraisableHookArgs") -> None:
    if not isinstance(dropped.exc_value, StopSignal):
        sys.__unraisablehook__(dropped)
