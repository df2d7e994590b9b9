"""Where the time goes: a process is in one phase at any moment, so that its phases add up to all of its time.

The parent and rank 0 keep a record each, by the one monotonic clock that all processes of a machine share; a worker
writes its own down as it goes, and the parent puts it in the place of its wait. What nobody has named is "other".
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from job.log import event, logger

OTHER = "other"
PHASES = {
    "start": "Python starts, and imports the job",
    "settings": "the settings are read and checked",
    "listing": "data, model, output and checkpoints are looked up in their stores",
    "download": "data, configuration and weights are fetched, and nothing else is done meanwhile",
    "tokenizing": "rows become token ids",
    "planning": "the plan is made, and handed over",
    "starting workers": "from their command to their first line",
    "importing": "rank 0 imports PyTorch and what else it trains with",
    "loading the model": "rank 0 loads the base model, and the engine prepares it",
    "proofs": "what the plan promises is tried before the first step, and a checkpoint is restored",
    "first step": "the first step of this start",
    "steps": "all other steps",
    "evaluating": "held-out loss and acceptance rows",
    "samples": "prompts are answered before and after",
    "saving": "checkpoints and adapter are written to the disk",
    "ending workers": "from their last line until all are gone",
    "merging": "the adapter is merged into the base model",
    "uploading": "to the stores",
    "reading back": "what was uploaded is fetched and compared",
    "accepting": "a fresh process loads the adapter",
    "report": "report, model card and manifest are made",
    OTHER: "all else",
}


@dataclass(frozen=True)
class Mark:
    """A phase begins, at a moment of the monotonic clock in seconds."""

    name: str
    time_s: float


class Phases:
    """The phases of one process, each from its mark to the next. With a file, marks are written there as they come."""

    def __init__(self, name: str, began_s: float, file: Path | None = None) -> None:
        self._marks: list[Mark] = []
        self._file = file
        self._add(Mark(name, began_s))

    @property
    def current(self) -> str:
        """The phase that the process is in."""
        return self._marks[-1].name

    def enter(self, name: str) -> None:
        """Begin a phase, which ends the one before; a phase that is entered again goes on."""
        if name != self.current:
            self._add(Mark(name, time.monotonic()))

    def put_in(self, marks: Iterable[Mark]) -> None:
        """Put another process's phases in the place of this one's from then on."""
        self._marks = sorted([*self._marks, *marks], key=lambda mark: mark.time_s)

    def add_up(self) -> dict[str, float]:
        """Return the seconds of each phase so far, in the order of `PHASES`, without those that there weren't."""
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for mark, following in pairwise([*self._marks, Mark(OTHER, time.monotonic())]):
            sums[mark.name] += following.time_s - mark.time_s
        return {name: round(seconds, 3) for name, seconds in sums.items() if seconds > 0 or name == OTHER}

    def _add(self, mark: Mark) -> None:
        self._marks.append(mark)
        if self._file is not None:
            with suppress(OSError), self._file.open("a", encoding="utf-8") as file:  # a full disk is for others to say
                file.write(json.dumps([mark.name, mark.time_s]) + "\n")


def _find_process_start() -> float:
    """Return when this process was started, by the monotonic clock: before Python's first line."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the boot; the 22nd field of proc_pid_stat(5)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    return time.monotonic() - max(0.0, age_s)


_phases = Phases("start", _find_process_start())  # of this process, of which there is one


def begin_phases(name: str, file: Path | None) -> None:
    """Begin this process's record anew, with a phase and in a file."""
    global _phases  # noqa: PLW0603 - a process has one record, as it has one log
    _phases = Phases(name, time.monotonic(), file)


def enter_phase(name: str) -> None:
    """Begin a phase of this process. Only the main thread does so."""
    _phases.enter(name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in a phase during the block, and then in the one before again; in other threads than the main one, this counts
    nothing, for what the main thread does meanwhile does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _phases.current
    _phases.enter(name)
    try:
        yield
    finally:
        _phases.enter(before)


def add_up_phases() -> dict[str, float]:
    """Return the seconds of each phase of this process so far, by name, in the order of `PHASES`."""
    return _phases.add_up()


def take_over_phases(file: Path) -> None:
    """Count what a worker wrote down as this process's phases, from the worker's first mark on."""
    if file.exists():
        content = file.read_bytes()
        whole_lines = content[: content.rfind(b"\n") + 1].splitlines()  # it may have been killed while it wrote
        _phases.put_in(Mark(*json.loads(line)) for line in whole_lines)


def log_phases() -> None:
    """Say where the time of this process went so far."""
    seconds = add_up_phases()
    fields = event("phases", total_s=round(sum(seconds.values()), 3), phases=seconds)
    logger.info("where the time went: %s", describe_phases(seconds), extra=fields)


def describe_phases(seconds: dict[str, float]) -> str:
    """Say it in a line, the longest first: `steps 12.1 s (48 %), importing 5.0 s (20 %), ...`."""
    total_s = sum(seconds.values())
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    shown = [f"{name} {spent:.1f} s ({spent / total_s:.0%})" for name, spent in longest if spent >= total_s / 100]
    return f"{total_s:.1f} s in all: {', '.join(shown)}"
