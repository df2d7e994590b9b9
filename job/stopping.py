"""SIGTERM and SIGINT become an exception in the main thread, which can't get lost.

Python drops an exception that is raised inside a destructor or a fork hook ("Exception ignored in ..."), and a signal
may come at just that moment. So the exception is raised again every few seconds, until `acknowledge_stop` says that the
job is on its way out, and Python's own report of the one that it dropped is left out. A second signal ends the process
at once; the kernel then ends the workers, which are tied to it.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from job.errors import PREEMPTED

_REMINDER_S = 2.0


class StopSignal(BaseException):
    """The job was told to stop. Not an Exception, so that no library takes it for a failure of its own and goes on."""


def raise_on_stop_signals() -> None:
    """From now on, raise StopSignal in the main thread on SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    sys.unraisablehook = _report_dropped


def acknowledge_stop() -> None:
    """End the reminders: called first where StopSignal is caught, and where cleaning up after it takes its time."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _report_dropped(dropped: "sys.UnraisableHookArgs") -> None:
    if not isinstance(dropped.exc_value, StopSignal):
        sys.__unraisablehook__(dropped)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name

    def remind(_number: int, _frame: FrameType | None) -> NoReturn:
        raise StopSignal(name)

    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, lambda *_: os._exit(PREEMPTED.code))
    signal.signal(signal.SIGALRM, remind)
    signal.setitimer(signal.ITIMER_REAL, _REMINDER_S, _REMINDER_S)
    raise StopSignal(name)
