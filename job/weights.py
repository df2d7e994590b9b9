"""The base model's weights, fetched while the main thread does something else."""

import shutil
import threading
from pathlib import Path

from job.inputs import BaseModel
from job.log import format_bytes, logger
from job.phases import phase

# What tokenizing may write for each byte that it reads, compressed data included, and what else is written meanwhile.
_TOKENS_PER_DATA = 16
_SPARE_BYTES = 64 << 20


class Weights:
    """A base model's weights on their way into the folder that its configuration is in."""

    def __init__(self, base_model: BaseModel, folder: Path) -> None:
        self._base_model = base_model
        self._folder = folder
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, *, data_bytes: int) -> None:
        """Begin to fetch them, to be waited for by `fetch`, while so much data is tokenized.

        Not where the disk may be too small for both: who runs out of it should be the one that needs too much.
        """
        wanted_bytes = self._base_model.weights_bytes()
        needed_bytes = wanted_bytes + _TOKENS_PER_DATA * data_bytes + _SPARE_BYTES
        if shutil.disk_usage(self._folder).free < needed_bytes:
            return
        logger.info("the base model's weights, %s, are fetched meanwhile", format_bytes(wanted_bytes))
        # What is under way when the main thread ends with an error isn't waited for: the process ends with it.
        self._thread = threading.Thread(target=self._fetch, name="weights", daemon=True)
        self._thread.start()

    def fetch(self) -> None:
        """Return when they are here. Raises what the store's `fetch` raises, whenever that was."""
        if self._thread is None:
            self._base_model.fetch_weights(self._folder)
            return
        with phase("download"):
            self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def _fetch(self) -> None:
        try:
            self._base_model.fetch_weights(self._folder)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the main thread's
            self._error = error
