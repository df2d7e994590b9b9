"""Chunks encoded by several processes, the results in order: with one process or with many, they are the same.

Each worker is a fresh process that holds the tokenizer and does one task at a time. It can be started before there is
a tokenizer, and imports meanwhile what it will need. Workers don't see SIGINT and SIGTERM, which are the parent's
business; none outlives the parent, and none is left when the pool is closed, or when results end before the last.
"""

import gc
import os
import pickle
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, NamedTuple

from job.data.encode_chunk import ChunkEncoder, EncodedChunk, Task
from job.data.encoding.tokens import warm_up
from job.errors import InternalError, JobError, ResourcesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A worker takes a second or two to start: for less than this, another one is not worth it.
WORKER_MIN_BYTES = 2 << 20
# A slow chunk holds up the results after it: this many chunks a worker may wait for it, in memory.
_CHUNKS_AHEAD = 2


class Encoders:
    """At most so many processes, started when they are first needed or asked for; a context that ends them."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, size_bytes: int) -> None:
        """Start what so many bytes are worth, and don't wait for it; those that have been started stay."""
        count = min(self._processes, size_bytes // WORKER_MIN_BYTES)
        if count > 1 and not self._workers:
            _start_workers(count, self._workers)

    def encode(
        self, tasks: Iterator[Task], tokenizer: "PreTrainedTokenizerBase"
    ) -> Generator[EncodedChunk, None, None]:
        """Encode tasks in those processes, or here if there are none; close it to end them early.

        Raises the first task's error, ResourcesError for a worker that was killed, InternalError for one that crashed.
        """
        if not self._workers:
            yield from map(ChunkEncoder(tokenizer), tasks)
            return
        try:
            pickled = pickle.dumps(tokenizer)
            for worker in self._workers:
                worker.send_bytes(pickled)
            yield from _share_out(tasks, self._workers)
        except BaseException:
            self.close()  # some are amid a task that nobody waits for
            raise

    def close(self) -> None:
        """End all processes, whatever they do."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def _share_out(tasks: Iterator[Task], workers: "list[_Worker]") -> Iterator[EncodedChunk]:
    idle = list(workers)
    busy: dict[Connection, tuple[int, _Worker]] = {}
    done: dict[int, EncodedChunk | JobError] = {}
    given = taken = 0
    while True:
        room = taken + _CHUNKS_AHEAD * len(workers) - given
        for task in islice(tasks, min(len(idle), room)):
            worker = idle.pop()
            worker.send_bytes(pickle.dumps(task))
            busy[worker.connection] = given, worker
            given += 1
        if not busy:
            return
        ready = wait(list(busy))
        for connection in [connection for connection in busy if connection in ready]:
            number, worker = busy.pop(connection)
            done[number] = worker.receive()
            idle.append(worker)
        while taken in done:
            result = done.pop(taken)
            taken += 1
            if isinstance(result, JobError):
                raise result
            yield result


class _Worker(NamedTuple):
    process: SpawnProcess
    connection: "Connection"

    def send_bytes(self, pickled: bytes) -> None:
        # bytes, not the view of a BytesIO that multiprocessing makes of an object: the garbage collector of Python
        # 3.12.1 crashes when it meets one, as in the frames of an error.
        try:
            self.connection.send_bytes(pickled)
        except ConnectionError as error:
            raise self._death() from error

    def receive(self) -> EncodedChunk | JobError:
        try:
            result: EncodedChunk | JobError = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        return result

    def _death(self) -> JobError:
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return _out_of_memory("a process that tokenized was killed, most likely because memory ran out")
        ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return InternalError(f"a process that tokenized ended {ending}", hint="see the lines above, and report it")


def _out_of_memory(message: str) -> ResourcesError:
    return ResourcesError(message, hint="give the job more memory or fewer cores, or break up very long rows")


def _start_workers(count: int, workers: list[_Worker]) -> None:
    """Start so many workers, and add each to the list, which the caller ends, come what may."""
    context = get_context("spawn")  # a forked process would inherit locks that other threads hold
    with _signals_held_back():
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block SIGINT and SIGTERM until the end of the block; processes that are started in it never see them.

    A Ctrl-C on a terminal goes to all of them, and a worker would print a traceback. The parent gets its signal later.
    """
    resource_tracker.ensure_running()  # else the first start does, and unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- the worker's side -------------------------------------------------------------------------------------------------


def _serve(connection: "Connection") -> None:
    """Receive tokenizers and tasks, and send back each task's result by the tokenizer before it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # every core has a worker: threads would only get in their way
    warm_up()
    encode: ChunkEncoder | None = None
    with suppress(EOFError, OSError):  # the parent is gone, perhaps in the middle of a message
        while True:
            received = connection.recv()
            if encode is not None and isinstance(received, Task):
                connection.send(_attempt(encode, received))
                gc.collect()
                continue
            encode = ChunkEncoder(received)
            # A row makes hundreds of objects, of which hardly any are in cycles. Collecting those once a chunk, and
            # never what was there before the first, takes a tenth off the whole.
            gc.freeze()
            gc.disable()


def _attempt(encode: ChunkEncoder, task: Task) -> EncodedChunk | JobError:
    try:
        return encode(task)
    except JobError as error:
        return error
    except MemoryError:
        return _out_of_memory("memory ran out in a process that tokenized")


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
