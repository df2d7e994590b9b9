"""The work folder belongs to one job at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job.disk_full import is_disk_full
from job.errors import ConfigError, JobError, ResourcesError


def refuse_work_dir(work_dir: Path, error: OSError) -> ConfigError:
    """Return what there is to say of a work folder in which nothing can be written."""
    return ConfigError(
        f"SFT_RUNTIME__WORK_DIR={work_dir}: can't be used: {error.strerror}", hint="name a folder that can be written"
    )


@contextmanager
def own_work_dir(work_dir: Path) -> Iterator[Path]:
    """Make the work folder and keep other jobs out of it.

    Raises ConfigError when it can't be made or another job uses it, ResourcesError when it is full.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = (work_dir / "lock").open("w")
    except OSError as error:
        raise refuse_work_dir(work_dir, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however this process ends
        except BlockingIOError as error:
            raise ConfigError(
                f"SFT_RUNTIME__WORK_DIR={work_dir}: another job is using it", hint="give each job a folder of its own"
            ) from error
        try:
            yield work_dir
        except Exception as error:
            if isinstance(error, JobError) or not is_disk_full(error):
                raise
            raise ResourcesError(
                f"SFT_RUNTIME__WORK_DIR={work_dir}: no space left on the disk", hint="give the folder more room"
            ) from error
