"""Signs of life for the job's watchdog: a beat for each micro batch, and the stacks of all threads when it asks.

Nothing here imports torch, so that a worker can be asked for its stacks while it still imports its libraries.
"""

import faulthandler
import os
import signal
from pathlib import Path

from job.handover import Heartbeat, RunFolder, write_whole

_RECORD_BYTES = 128  # a Heartbeat as JSON is never longer


def dump_stacks_when_asked(path: Path) -> None:
    """From now on, append the stacks of all threads to a file at each SIGUSR1; its first line is the process id.

    It needs neither the interpreter nor the main thread, which may hang in a call of CUDA or gloo.
    """
    file = path.open("w", encoding="utf-8")  # faulthandler holds on to it
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    file.write(f"{os.getpid()}\n")  # not before the signal is harmless
    file.flush()


class Pulse:
    """The heartbeat of one worker. Its file doesn't exist before the first beat.

    All workers must beat at the same points of their work: who has given fewer beats is taken to be behind."""

    def __init__(self, folder: RunFolder, *, rank: int) -> None:
        self._path = folder.heartbeat(rank)
        self._file: int | None = None
        self._beats = 0
        self._step = 0

    def beat(self, step: int | None = None) -> None:
        """Give a sign of life, in a step, or in the same one as before. It takes microseconds."""
        self._beats += 1
        self._step = self._step if step is None else step
        heartbeat = Heartbeat(beats=self._beats, step=self._step)
        record = heartbeat.model_dump_json().ljust(_RECORD_BYTES)
        # No beat may be left out: the one before a step of many minutes tells a rank that is behind from the others.
        # So each overwrites the last in its place, which needs no new file and no room on the disk.
        if self._file is None:
            write_whole(self._path, record)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            os.pwrite(self._file, record.encode(), 0)
