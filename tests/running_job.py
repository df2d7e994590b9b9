"""A job whose output is read while it runs, and the processes that belong to it."""

import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from job_cli import TIMEOUT_S, start_job


class RunningJob:
    """A job whose output is read while it runs; whatever is left of it ends with the `with` block."""

    def __init__(self, environment: dict[str, str], *prefix: str) -> None:
        self.log = Path(environment["SFT_RUNTIME__TERMINATION_LOG"])
        self.work_dir = environment["SFT_RUNTIME__WORK_DIR"]
        self.process = start_job(environment, prefix=prefix)
        self.output = ""
        self._ended = False
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started = [*self.descendants(), *self.strays()]
        self.process.kill()
        for process in [*started, *self.strays()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.output += line
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, text: str) -> None:
        """Wait until the job has said this."""
        with self._grown:
            self._grown.wait_for(lambda: text in self.output or self._ended, timeout=TIMEOUT_S)
            assert text in self.output, self.output

    def descendants(self) -> list[psutil.Process]:
        """Return all processes below the job, each known by its id and the time at which it was created."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def strays(self) -> list[psutil.Process]:
        """Return launchers and workers of this job, whoever their parent is now."""
        return [
            process for process in psutil.process_iter() if any(self.work_dir in word for word in words_of(process))
        ]

    def worker(self, rank: int) -> psutil.Process:
        """Return the worker process of a rank."""
        workers = [process for process in self.descendants() if is_module(process, "job.train.worker")]
        return next(process for process in workers if process.environ().get("RANK", "0") == str(rank))

    def launcher(self) -> psutil.Process:
        """Return the process of `accelerate launch`."""
        return next(process for process in self.descendants() if is_module(process, "accelerate.commands.launch"))


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def is_module(process: psutil.Process, module: str) -> bool:
    words = words_of(process)
    return ("-m", module) in pairwise(words)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
