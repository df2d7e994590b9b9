"""Downloads cut into segments over threads, whatever the store: a `Source` yields bytes and verifies the result.

A file is written under a temporary name, verified, synced and renamed; a broken segment or a damaged file is fetched
again a few times. No temporary file outlives an error.
"""

import errno
import os
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from job.errors import DamagedError, UnavailableError
from job.storage import Progress
from job.storage.paths import TEMPORARY_PREFIX, disk_errors, sync, sync_folder

THREADS = 8
THREADS_FOR_SMALL = 32  # which wait for the network most of the time
TRIES = 4
SEGMENT_BYTES = 16 * 2**20
PIECE_BYTES = 2**20  # as little of Python as can be, and yet received, hashed and written within the processor's cache
SMALL_BYTES = 2**20

Task = Callable[[], "list[Task]"]  # does one thing, and returns what is to be done because of it


class BrokenTransferError(Exception):
    """Bytes that did not arrive whole or right: worth another try."""


class DamagedTransferError(BrokenTransferError):
    """Bytes that arrived whole, and are not those that were written."""


class _AbandonedError(Exception):
    """Ends a thread whose download was given up; nobody waits for it."""


class RestartTransferError(Exception):
    """The source found that it must be cut into other segments."""


@dataclass(frozen=True)
class Segment:
    """A piece of an object that is fetched by one request: a range of bytes, or a part of a multipart object."""

    index: int
    start: int = 0
    size_bytes: int | None = None  # None: as much as the answer holds
    part_number: int | None = None


class Source(Protocol):
    """One object to download."""

    label: str  # names the object in messages
    size_bytes: int

    def segments(self) -> list[Segment]:
        """Cut the object into pieces that can be fetched on their own; called on one of the threads."""
        ...

    def stream(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the file, bytes); raises BrokenTransferError or RestartTransferError."""
        ...

    def verify(self, path: Path) -> None:
        """Raise BrokenTransferError unless the file is what the store holds."""
        ...


def retry_delay_s(tries: int) -> float:
    """Return how long to wait after so many failed tries: exponential, with jitter."""
    return min(8.0, 0.4 * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def run_tasks(tasks: list[Task], stop: threading.Event, threads: int = THREADS) -> None:
    """Run the tasks, and those that they return, on threads; the first error ends all and is raised.

    On any exception, a signal handler's in the main thread too, `stop` is set, tasks not begun are dropped, and those
    under way are not waited for.
    """
    # Not an executor, whose futures cost more than a small file's other Python does.
    waiting: SimpleQueue[Task | None] = SimpleQueue()
    ended: SimpleQueue[list[Task] | BaseException] = SimpleQueue()
    outstanding = started = 0
    try:
        while True:
            for task in tasks:
                waiting.put(task)
            outstanding += len(tasks)
            for _ in range(started, min(threads, outstanding)):
                threading.Thread(target=_run_waiting, args=(waiting, ended, stop), name="transfer", daemon=True).start()
                started += 1
            if outstanding == 0:
                break
            result = ended.get()
            if isinstance(result, BaseException):
                raise result
            tasks = result
            outstanding -= 1
    except BaseException:
        stop.set()
        raise
    finally:
        for _ in range(started):
            waiting.put(None)


def _run_waiting(
    waiting: "SimpleQueue[Task | None]", ended: "SimpleQueue[list[Task] | BaseException]", stop: threading.Event
) -> None:
    while (task := waiting.get()) is not None and not stop.is_set():
        try:
            ended.put(task())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is for the one who waits
            ended.put(error)


def download(
    sources: list[tuple[Source, Path]], progress: Progress, arrived: Callable[[Path], None] | None = None
) -> None:
    """Download every source to its path, all over the same threads; no temporary file is left, whatever happens.

    `arrived` is told of each path on one of the threads, as soon as the file is there.
    """
    stop = threading.Event()
    downloads = [_Download(source, target, progress, stop, arrived) for source, target in sources]
    try:
        tasks: list[Task] = []
        for one in downloads:
            with disk_errors(one.target.parent, one.source.label):
                one.target.parent.mkdir(parents=True, exist_ok=True)
            tasks.append(one.begin)
        small = sum(source.size_bytes < SMALL_BYTES for source, _ in sources)
        run_tasks(tasks, stop, THREADS_FOR_SMALL if small > len(sources) / 2 else THREADS)
        for folder in {target.parent for _, target in sources}:
            sync_folder(folder)
    except BaseException:
        stop.set()
        for one in downloads:
            one.abandon()
        raise


class _Download:
    """One file on its way. Its segments run on several threads; the one that ends last verifies and renames."""

    def __init__(
        self,
        source: Source,
        target: Path,
        progress: Progress,
        stop: threading.Event,
        arrived: Callable[[Path], None] | None,
    ) -> None:
        self._arrived = arrived
        self.source = source
        self.target = target
        self._folder = target.parent
        self._temporary = target.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._created = False
        self._restart = False
        self._remaining = 0
        self._written_bytes = 0
        self._damaged = 0

    def begin(self) -> list[Task]:
        """Fetch what is one segment; else return the work on each."""
        segments = self.source.segments()
        self._restart, self._remaining, self._written_bytes = False, len(segments), 0
        if len(segments) == 1:
            return self._run(segments[0])
        return [partial(self._run, segment) for segment in segments]

    def abandon(self) -> None:
        """Remove the temporary file; segments still under way can't bring it back."""
        with self._lock:
            self._stop.set()
            self._temporary.unlink(missing_ok=True)

    def _run(self, segment: Segment) -> list[Task]:
        try:
            written_bytes = 0 if self._restart else self._fetch(segment)
        except RestartTransferError:
            self._restart, written_bytes = True, 0
        with self._lock:
            self._written_bytes += written_bytes
            self._remaining -= 1
            last = self._remaining == 0
        return self._finish() if last else []

    def _fetch(self, segment: Segment) -> int:
        tries = 0
        while True:
            written_bytes = 0
            try:
                with self._open() as descriptor:
                    for offset, piece in self.source.stream(segment):
                        self._write(descriptor, offset, piece)
                        written_bytes += len(piece)
                        self._progress(len(piece))
                    if written_bytes >= SMALL_BYTES:
                        # The disk begins to write it now: less is left for the sync at the end.
                        start = offset + len(piece) - written_bytes
                        with suppress(OSError):  # a hint, which not every file system takes
                            os.posix_fadvise(descriptor, start, written_bytes, os.POSIX_FADV_DONTNEED)
                if segment.size_bytes not in (None, written_bytes):
                    raise BrokenTransferError(f"{written_bytes} of {segment.size_bytes} bytes arrived")
            except RestartTransferError:
                self._progress(-written_bytes)
                raise
            except BrokenTransferError as error:
                self._progress(-written_bytes)
                tries += 1
                self._wait_or_give_up(tries, error)
            else:
                return written_bytes

    @contextmanager
    def _open(self) -> Iterator[int]:
        with disk_errors(self._folder, self.source.label), self._lock:
            if self._stop.is_set():
                raise _AbandonedError
            flags = os.O_WRONLY if self._created else os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(self._temporary, flags, 0o666)
            is_new, self._created = not self._created, True
        try:
            if is_new and self.source.size_bytes >= SMALL_BYTES:
                self._reserve(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int) -> None:
        with disk_errors(self._folder, self.source.label):
            try:
                # A disk that is too small is found now, not after the last gigabyte.
                os.posix_fallocate(descriptor, 0, self.source.size_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without preallocation
                    raise

    def _write(self, descriptor: int, offset: int, piece: bytes) -> None:
        if self._stop.is_set():
            raise _AbandonedError
        with disk_errors(self._folder, self.source.label):
            view = memoryview(piece)
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count

    def _finish(self) -> list[Task]:
        if self._restart:
            self._progress(-self._written_bytes)
            return self.begin()
        try:
            if self._written_bytes != self.source.size_bytes:
                raise BrokenTransferError(f"{self._written_bytes} of {self.source.size_bytes} bytes arrived")
            self.source.verify(self._temporary)
        except BrokenTransferError as error:
            self._progress(-self._written_bytes)
            self._damaged += 1
            self._wait_or_give_up(self._damaged, error)
            return self.begin()
        if self.source.size_bytes < SMALL_BYTES:
            return [self._settle]  # after all that wait to be fetched: disks sync many files at once for little more
        return self._settle()

    def _settle(self) -> list[Task]:
        with disk_errors(self._folder, self.source.label):
            sync(self._temporary)
            self._temporary.replace(self.target)
        if self._arrived is not None:
            self._arrived(self.target)
        return []

    def _wait_or_give_up(self, tries: int, error: BrokenTransferError) -> None:
        if tries >= TRIES:
            kind = DamagedError if isinstance(error, DamagedTransferError) else UnavailableError
            raise kind(
                f"{self.source.label}: {error}, {tries} times over",
                hint="the network or the store damages what it sends; try again later",
            )
        if self._stop.wait(retry_delay_s(tries)):
            raise _AbandonedError
