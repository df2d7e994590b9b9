"""Notices workers that have come to a stand, and shows where: the stacks of all of their threads.

A worker gives a beat for each micro batch. One that hangs holds up all others, in a collective that it doesn't join;
the run is ended when those that are behind have been silent for too long. Silence is measured by this process's own
looks at the beats, and not by the time between them: where the whole machine stood still, nobody could beat.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR1

import psutil
from pydantic import ValidationError

from job.errors import InternalError, JobError, UnavailableError
from job.handover import Heartbeat, RunFolder
from job.log import logger
from job.processes import child_pids

_LOOK_S = 1.0
_MOST_PER_LOOK_S = 2.0
_LOADING_S = 600.0
_ENDING_S = 120.0
_STACKS_WAIT_S = 3.0
_STACKS_POLL_S = 0.2
_STACKS_LINES = 60
_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped",  # SIGSTOP, a debugger
    psutil.STATUS_DISK_SLEEP: "its process waits for a device",
}
_GONE = "its process is gone"
_DEAF = "its process answers to no signal"
_HINT = "see the workers' stacks in the log; if a micro batch may take so long, raise SFT_RUNTIME__HANG_MINUTES"


@dataclass
class _Rank:
    """What is known of one worker. `silent_s`: for how long its beats have stayed the same. `state`, once it hangs: why
    it can't be waiting for another."""

    rank: int
    heartbeat: Heartbeat | None = None
    silent_s: float = 0.0
    has_ended: bool = False
    process: psutil.Process | None = None
    state: str = ""
    stacks: str = ""

    @property
    def beats(self) -> int:
        """How many it has given."""
        return 0 if self.heartbeat is None else self.heartbeat.beats

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.heartbeat is None:
            return "while loading the model"
        return f"in step {self.heartbeat.step}" if self.heartbeat.step else "before the first step"


class Watchdog:
    """Watches this node's `ranks` of one attempt at training, whose workers write into `folder`.

    `limit_s`: how long a worker may take for a micro batch. Loading the model, which has no beats, may take twice that,
    and at least 10 minutes. With `several_nodes` the cause of a hang may lie on another.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Iterable[int],
        *,
        limit_s: float,
        several_nodes: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._ranks = [_Rank(rank) for rank in ranks]
        self._limit_s = limit_s
        self._loading_limit_s = max(2 * limit_s, _LOADING_S)
        self._several_nodes = several_nodes
        self._clock = clock
        self._looked_s = clock()
        self._ending_s = 0.0

    def check(self) -> bool:
        """Look at the beats, at most once a second.

        Returns whether the workers have said how they ended, long ago, and yet the launcher still runs: there is
        nothing to wait for. Raises InternalError, or with several nodes UnavailableError, when one holds up the
        others for too long; the log then has the stacks of all, and they are killed.
        """
        elapsed_s = self._clock() - self._looked_s
        if elapsed_s < _LOOK_S:
            return False
        self._looked_s += elapsed_s
        passed_s = min(elapsed_s, _MOST_PER_LOOK_S)
        for rank in self._ranks:
            self._look_at(rank, passed_s)
        if self._is_ending():
            self._ending_s += passed_s
            return self._ending_s > min(_ENDING_S, self._limit_s)
        if self._hangs():
            raise self._end_hang()
        return False

    def _look_at(self, rank: _Rank, passed_s: float) -> None:
        before = rank.beats
        # The file is written over in place, so that half of it may be new.
        with suppress(FileNotFoundError, ValidationError):
            rank.heartbeat = Heartbeat.model_validate_json(self._folder.heartbeat(rank.rank).read_bytes())
        rank.silent_s = 0.0 if rank.beats != before else rank.silent_s + passed_s
        rank.has_ended = rank.has_ended or self._folder.outcome(rank.rank).exists()

    def _is_ending(self) -> bool:
        if all(rank.has_ended for rank in self._ranks):
            return True
        # One has failed: the launcher ends the others.
        return any(rank.has_ended for rank in self._ranks) and any(o.code for o in self._folder.read_outcomes())

    def _hangs(self) -> bool:
        # Those that have come furthest may be waiting for the others, so the ones that are behind count.
        return all(
            rank.silent_s >= (self._limit_s if rank.heartbeat is not None else self._loading_limit_s)
            for rank in _find_last([rank for rank in self._ranks if not rank.has_ended])
        )

    def _end_hang(self) -> JobError:
        """Log where all workers stand, and kill them; return the error that says so."""
        self._ask_for_stacks()
        for rank in self._ranks:
            _log_state(rank)
            if rank.process is not None:  # SIGTERM would wait for whatever it hangs in
                with suppress(psutil.NoSuchProcess):
                    rank.process.kill()
        kind = UnavailableError if self._several_nodes else InternalError
        return kind(_explain([rank for rank in self._ranks if not rank.has_ended]), hint=_HINT)

    def _ask_for_stacks(self) -> None:
        """Have all workers write their stacks down, and read them."""
        ours = child_pids()
        for rank in self._ranks:
            rank.process = _ask_for_stacks(self._folder.stacks(rank.rank), ours)
        end_s = time.monotonic() + _STACKS_WAIT_S
        asked = [rank for rank in self._ranks if rank.process is not None]
        # On several nodes, the others' watchdogs are to bark, too, before they hear of this one.
        while time.monotonic() < end_s and (self._several_nodes or not all(rank.stacks for rank in asked)):
            time.sleep(_STACKS_POLL_S)
            for rank in asked:
                rank.stacks = _read_stacks(self._folder.stacks(rank.rank))
        for rank in self._ranks:
            rank.state = _find_state(rank)


def _ask_for_stacks(path: Path, ours: set[int]) -> psutil.Process | None:
    """Send the signal to the worker that is to write there; return it, if it is one of `ours` (process ids)."""
    # It may be gone, or may not have come so far as to know what to do on the signal, which would kill it.
    with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        pid = int(path.read_text(encoding="utf-8").partition("\n")[0])
        if pid in ours:
            process = psutil.Process(pid)
            process.send_signal(SIGUSR1)
            return process
    return None


def _read_stacks(path: Path) -> str:
    """Return what has been written after the process id, the main thread first."""
    _, _, written = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    threads = [thread for thread in written.split("\n\n") if thread.strip()]
    lines = "\n\n".join(thread.strip("\n") for thread in reversed(threads)).splitlines()  # the oldest comes last
    return "\n".join(lines[:_STACKS_LINES])


def _find_state(rank: _Rank) -> str:
    if rank.process is None:
        return _GONE if rank.heartbeat is not None else ""
    try:
        return _STATES.get(rank.process.status(), "" if rank.stacks else _DEAF)
    except psutil.NoSuchProcess:
        return _GONE


def _log_state(rank: _Rank) -> None:
    state = f", and {rank.state}" if rank.state else ""
    logger.error("rank %d: %s, %d beats, silent for %.0f s%s", rank.rank, rank.place, rank.beats, rank.silent_s, state)
    if rank.stacks:
        logger.error("the threads of rank %d, the main one first:\n%s", rank.rank, rank.stacks)


def _find_last(ranks: Sequence[_Rank]) -> list[_Rank]:
    least = min(rank.beats for rank in ranks)
    return [rank for rank in ranks if rank.beats == least]


def _explain(ranks: Sequence[_Rank]) -> str:
    """Say which of the ranks that have not ended holds up the others."""
    # One that is stopped or gone can't be waiting. Where all have come equally far, their stacks must tell.
    culprits = [rank for rank in ranks if rank.state] or _find_last(ranks)
    first = culprits[0]
    # Others may have gone on for a while, up to the end of the step.
    waiting = [rank for rank in ranks if rank not in culprits and rank.silent_s > first.silent_s / 2]
    many = len(culprits) > 1
    name = _name(culprits)
    if first.heartbeat is None:
        message = f"{name} did not begin to train within {_format_time(first.silent_s)}"
    else:
        message = (
            f"{name} {'have' if many else 'has'} finished no micro batch for {_format_time(first.silent_s)}: "
            f"stopped {first.place}"
        )
    if first.state:
        message += f" ({first.state})"
    if waiting:
        message += f", and {_name(waiting)} {'wait' if len(waiting) > 1 else 'waits'} for {'them' if many else 'it'}"
    return message


def _name(ranks: Sequence[_Rank]) -> str:
    listed = [str(rank.rank) for rank in ranks]
    return f"rank {listed[0]}" if len(listed) == 1 else f"ranks {', '.join(listed[:-1])} and {listed[-1]}"


def _format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.3g} min"
