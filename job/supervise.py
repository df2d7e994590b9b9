"""Watching the workers of one attempt: checkpoints go to the store, a wish to stop goes to the workers, and the others'
end, a hang or the time limit are noticed."""

import subprocess
import time

from job.checkpoints.uploads import Uploads
from job.errors import PreemptedError
from job.handover import RunFolder, StopRequest, write_whole
from job.log import logger
from job.nodes.peers import Peers
from job.settings_runtime import RuntimeSettings
from job.stopping import GRACE_SHARE, StopSignal, acknowledge_stop
from job.watchdog import Watchdog

_POLL_S = 0.2
_ENDING_S = 60.0  # without a signal


class Supervisor:
    """The watch over one attempt, in the job's main thread."""

    def __init__(
        self,
        folder: RunFolder,
        peers: Peers,
        uploads: Uploads,
        watchdog: Watchdog,
        runtime: RuntimeSettings,
        *,
        deadline_s: float | None,
        finish_at_deadline: bool,
    ) -> None:
        self._folder = folder
        self._peers = peers
        self._uploads = uploads
        self._watchdog = watchdog
        self.grace_s = runtime.grace_seconds * GRACE_SHARE  # for the workers, after a signal
        self._max_hours = runtime.max_hours
        self._deadline_s = deadline_s
        self._finish_at_deadline = finish_at_deadline
        self._stop_by_s: float | None = None  # by when a signal's grace is over
        self._reason = ""

    def wait(self, launcher: "subprocess.Popen[bytes]") -> int:
        """Wait until the launcher ends, and return its exit status.

        Raises PreemptedError when there is nothing to wait for after a signal, and what the watch finds.
        """
        while True:
            try:
                return self._watch(launcher)
            except StopSignal as signal:  # a second one ends the process at once
                acknowledge_stop()
                self._request_stop(str(signal))

    def _watch(self, launcher: "subprocess.Popen[bytes]") -> int:
        while True:
            try:
                return launcher.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                self._uploads.poll()
                self._peers.check()
                if self._watchdog.check():
                    logger.warning("the workers have ended their work, but not their processes: ending them")
                    return 0  # their outcomes tell
                self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        if self._stop_by_s is not None and now_s > self._stop_by_s:
            raise self.preempted(None)
        if self._deadline_s is not None and now_s > self._deadline_s:
            self._deadline_s = None
            self._reason = f"SFT_RUNTIME__MAX_HOURS={self._max_hours:g}"
            self._ask(StopRequest(reason=self._reason, finish=self._finish_at_deadline))

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has asked for it."""
        return self._stop_by_s is not None

    def _request_stop(self, name: str) -> None:
        self._reason = name
        self._stop_by_s = time.monotonic() + self.grace_s
        if not any(self._folder.root.glob("heartbeat-*.json")):  # nothing has been learned since the last checkpoint
            raise self.preempted(None)
        self._ask(StopRequest(reason=name))

    def _ask(self, request: StopRequest) -> None:
        what = "evaluation stops here" if self._folder.trained.exists() else "training stops after this step"
        logger.info("%s: %s", request.reason, what)
        write_whole(self._folder.stop_request, request.model_dump_json())

    @property
    def left_s(self) -> float:
        """How many seconds there are for what comes after the workers' end."""
        return _ENDING_S if self._stop_by_s is None else max(0.0, self._stop_by_s - time.monotonic())

    def flush(self) -> None:
        """Wait for the last checkpoint to be in the store, as long as there is time."""
        self._uploads.flush(self.left_s)

    def preempted(self, step: int | None) -> PreemptedError:
        """Return the error for a run that was stopped after a step (None: before it had come to the end of one)."""
        newest = self._uploads.newest_step
        why = f"stopped by {self._reason}" if self._reason else "stopped, for another node was told to,"
        error = PreemptedError(
            why + (f" after step {step}" if step is not None else ""),
            hint="start it again: " + ("it begins anew" if newest is None else f"it goes on from step {newest}"),
        )
        error.step = step
        return error
