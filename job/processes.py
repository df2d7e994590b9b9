"""No orphans, ever: children that die with their parent, and a parent that finds and ends whatever is left of them.

Linux only, through prctl(2): PR_SET_PDEATHSIG kills a child when its parent dies, however it dies;
PR_SET_CHILD_SUBREAPER makes grandchildren whose parent died children of the job, where they can be ended and reaped.
"""

import contextlib
import ctypes
import os
import signal

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded at import: it isn't safe to between fork and exec


def adopt_orphans() -> None:
    """Make this process the new parent of descendants that lose theirs."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process, a new child of `parent_pid`, when that dies: for `preexec_fn`, since nothing
    but two system calls happens in it."""
    die_with_parent()
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def end_descendants(*, spared: set[int], grace_s: float) -> None:
    """End all descendants but those in `spared` (process ids): SIGTERM, after `grace_s` seconds SIGKILL; reap them."""
    _signal_all(signal.SIGTERM, spared)
    psutil.wait_procs(_descendants(spared), timeout=grace_s)
    while left := _descendants(spared):
        _signal_all(signal.SIGKILL, spared)
        psutil.wait_procs(left, timeout=1)


def _descendants(spared: set[int]) -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in spared]


def _signal_all(number: signal.Signals, spared: set[int]) -> None:
    for process in _descendants(spared):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def child_pids() -> set[int]:
    """Return the ids of all descendants of this process."""
    return {process.pid for process in psutil.Process(os.getpid()).children(recursive=True)}
