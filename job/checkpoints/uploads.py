"""The workers' checkpoints go to the store while training goes on: one at a time, the newest, the others never."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from job.errors import JobError
from job.handover import SAVED_STEP, SavedStep
from job.log import event, format_bytes, logger

_TAKEN = "taken-"
_RETRY_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True)
class _Uploaded:
    saved: SavedStep
    size_bytes: int
    upload_s: float


class Uploads:
    """Watches the folder in which rank 0 leaves checkpoints, `folder`; `commit` puts one of them into the store, whose
    newest is that of `newest_step` so far.

    `poll` is called by whoever watches the workers. A failed upload is a warning, and tried again until there is a
    newer checkpoint: training doesn't end because a store is away.
    """

    def __init__(
        self, folder: Path, commit: Callable[[Path, SavedStep], None], *, newest_step: int | None, grace_s: float
    ) -> None:
        self.newest_step = newest_step  # of those in the store
        self._folder = folder
        self._commit = commit
        self._grace_s = grace_s
        self._is_first = True
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[_Uploaded] | None = None
        self._taken: Path | None = None
        self._not_before_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def poll(self) -> None:
        """Note how an upload has ended, and begin the next. Takes microseconds; a StopSignal may break it off anywhere,
        and the next call goes on."""
        if self._running is not None:
            if not self._running.done():
                return
            ended, self._running = self._running, None
            self._note_end(ended)
        newer = self._take_newest()
        if newer is not None:
            self._drop_taken()
            self._taken, self._not_before_s = newer, 0.0
        if self._taken is not None and time.monotonic() >= self._not_before_s:
            self._running = self._pool.submit(self._upload, self._taken)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything that the workers have left is in the store, or the time is up. One failure ends it."""
        deadline_s = time.monotonic() + timeout_s
        self._not_before_s = 0.0
        self.poll()
        while self._running is not None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            self.poll()

    def _take_newest(self) -> Path | None:
        """Rename the newest checkpoint, so that the workers leave it alone, and remove older ones."""
        names = sorted(path.name for path in self._folder.glob("step-*") if path.suffix == "")
        if not names:
            return None
        taken = self._folder / f"{_TAKEN}{names[-1]}"
        try:
            (self._folder / names[-1]).rename(taken)
        except FileNotFoundError:  # a newer one has just replaced it
            return None
        for name in names[:-1]:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        return taken

    def _upload(self, taken: Path) -> _Uploaded:
        started_s = time.monotonic()
        saved = SavedStep.model_validate_json((taken / SAVED_STEP).read_bytes())
        size_bytes = sum(path.stat().st_size for path in taken.iterdir())
        self._commit(taken, saved)
        self.newest_step = saved.step
        return _Uploaded(saved, size_bytes, time.monotonic() - started_s)

    def _note_end(self, ended: "Future[_Uploaded]") -> None:
        try:
            uploaded = ended.result()
        except JobError as error:
            name = "" if self._taken is None else self._taken.name.removeprefix(_TAKEN)
            logger.warning("checkpoint %s is not in the store, and will be tried again: %s", name, error.message)
            self._not_before_s = time.monotonic() + _RETRY_S
            return
        self._drop_taken()
        saved, upload_s = uploaded.saved, uploaded.upload_s
        logger.info(
            "checkpoint of step %d is in the store: %s, saved in %.2f s, uploaded in %.2f s",
            saved.step,
            format_bytes(uploaded.size_bytes),
            saved.save_s,
            upload_s,
            extra=event(
                "checkpoint",
                step=saved.step,
                size_bytes=uploaded.size_bytes,
                save_s=round(saved.save_s, 3),
                upload_s=round(upload_s, 3),
            ),
        )
        if self._is_first and saved.save_s + upload_s > self._grace_s:
            logger.warning(
                "a checkpoint takes %.0f s, and SFT_RUNTIME__GRACE_SECONDS=%g: after SIGTERM, the run would go back to "
                "the one before. Give it more time (in Kubernetes: terminationGracePeriodSeconds), and say so there",
                saved.save_s + upload_s,
                self._grace_s,
            )
        self._is_first = False

    def _drop_taken(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            shutil.rmtree(taken, ignore_errors=True)
