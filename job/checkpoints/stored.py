"""Checkpoints in a store: folders of files, each with a `checkpoint.json`, written last, that lists them with sha256.

`step-00000042` holds what training goes on from, `finished` what is published when nothing is left to train. The
store is the truth: a start may be on a fresh machine with an empty disk.
"""

import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from job.errors import DamagedError, JobError, NotFoundError
from job.log import logger, transfer_progress
from job.manifest import hash_file
from job.storage import Store, StoredFile

CHECKPOINTS = "checkpoint"  # the folder in the slot
FINISHED = "finished"
_COMMIT = "checkpoint.json"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointFile(BaseModel):
    """One file of a checkpoint, by its path within it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    bytes: int


class Checkpoint(BaseModel):
    """What `checkpoint.json` says: how far which run had come, on how many processes, by which plan, and the files.

    `run` is `describe_run`'s, to say what differs when another run finds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_id: str
    step: int
    world_size: int
    created_at: str
    job_version: str
    plan: dict[str, Any]
    run: dict[str, Any]
    files: list[CheckpointFile] = []


def step_folder(step: int) -> str:
    """Return the name of the folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def list_files(folder: Path) -> list[CheckpointFile]:
    """Return what lies in a folder, at any depth."""
    return [
        CheckpointFile(path=path.relative_to(folder).as_posix(), sha256=hash_file(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


class CheckpointStore:
    """The checkpoints at one place of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def uri(self) -> str:
        """Where they are."""
        return self.store.uri

    def names(self) -> list[str]:
        """Return the committed ones: `finished` first, then the steps, newest first."""
        return _find_committed(self._list())

    def has_finished(self, run_id: str) -> bool:
        """Say whether all that is to be published of a run is there."""
        return FINISHED in self.names() and not self._is_of_another(FINISHED, run_id)

    def read(self, name: str) -> Checkpoint:
        """Return what a checkpoint says of itself.

        Raises DamagedError when that can't be read, and the store's errors.
        """
        content = self.store.read(f"{name}/{_COMMIT}")
        if content is None:
            raise DamagedError(f"{self.uri}/{name}: {_COMMIT} is gone")
        try:
            return Checkpoint.model_validate_json(content)
        except ValidationError as error:
            raise DamagedError(f"{self.uri}/{name}: {_COMMIT} is damaged") from error

    def commit(self, folder: Path, name: str, checkpoint: Checkpoint) -> None:
        """Upload everything in a folder, then the word that it is all there. What was there under that name goes."""
        files = list_files(folder)
        self.store.delete(f"{name}/{_COMMIT}")
        self.store.put_all([(folder / file.path, f"{name}/{file.path}") for file in files])
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=folder.parent) as commit:
            commit.write(checkpoint.model_copy(update={"files": files}).model_dump_json(indent=2) + "\n")
            commit.flush()
            self.store.put(Path(commit.name), f"{name}/{_COMMIT}")

    def fetch(self, name: str, checkpoint: Checkpoint, target: Path) -> None:
        """Bring a checkpoint's files into a fresh folder, and compare each with its sha256.

        Raises DamagedError when one is missing or another, and the store's errors.
        """
        shutil.rmtree(target, ignore_errors=True)
        stored = {file.path: file for file in self._list()}
        expected = {f"{name}/{file.path}": file for file in checkpoint.files}
        missing = expected.keys() - stored.keys()
        if missing:
            raise DamagedError(f"{self.uri}: {min(missing)} is missing")
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=target.parent) as scratch:
            size_bytes = sum(file.bytes for file in checkpoint.files)
            with transfer_progress("checkpoint", size_bytes) as progress:
                paths = self.store.fetch([stored[path] for path in expected], Path(scratch), progress)
            for path, (place, file) in zip(paths, expected.items(), strict=True):
                if hash_file(path) != file.sha256:
                    raise DamagedError(f"{self.uri}/{place}: its sha256 is not what {_COMMIT} says")
                (target / file.path).parent.mkdir(parents=True, exist_ok=True)
                if path.is_relative_to(scratch):
                    path.rename(target / file.path)
                else:
                    shutil.copyfile(path, target / file.path)

    def delete(self, name: str) -> None:
        """Remove a checkpoint, its `checkpoint.json` first, so that half of one is never taken for a whole."""
        self._delete_files(file for file in self._list() if file.path.startswith(f"{name}/"))

    def retain(self, keep: int, *, newest_step: int) -> None:
        """Remove all steps up to the newest one but the last few of them, and what uploads that broke off have left.

        Later steps are those that a start has passed over: they stay until they are written anew.
        """
        found, newest = self._list(), step_folder(newest_step)
        kept = [name for name in _find_committed(found) if name != FINISHED and name <= newest][:keep]
        self._delete_files(
            file
            for file in found
            if _STEP.fullmatch(_folder_of(file)) and _folder_of(file) <= newest and _folder_of(file) not in kept
        )

    def clear(self, run_id: str) -> None:
        """Remove the checkpoints of a run that is published; a failure is a warning, for they do no harm then.

        Another run, which is to replace it, may have its own there.
        """
        try:
            found = self._list()
            others = {name for name in _find_committed(found) if self._is_of_another(name, run_id)}
            self._delete_files(
                file for file in found if _is_checkpoint(_folder_of(file)) and _folder_of(file) not in others
            )
        except JobError as error:
            logger.warning("checkpoints stay behind: %s", error.message)

    def _is_of_another(self, name: str, run_id: str) -> bool:
        try:
            return self.read(name).run_id != run_id
        except DamagedError:
            return False

    def _list(self) -> list[StoredFile]:
        try:
            return self.store.find()
        except NotFoundError:
            return []

    def _delete_files(self, files: Iterable[StoredFile]) -> None:
        for file in sorted(files, key=lambda file: not _is_commit(file)):
            self.store.delete(file.path)


def _find_committed(files: list[StoredFile]) -> list[str]:
    names = {_folder_of(file) for file in files if _is_commit(file) and _is_checkpoint(_folder_of(file))}
    steps = sorted(names - {FINISHED}, key=lambda name: int(name.removeprefix("step-")), reverse=True)
    return [FINISHED] * (FINISHED in names) + steps


def _folder_of(file: StoredFile) -> str:
    """Return the first folder of a file's path, "" for one that lies in none."""
    return file.path.split("/", 1)[0] if "/" in file.path else ""


def _is_commit(file: StoredFile) -> bool:
    return file.path == f"{_folder_of(file)}/{_COMMIT}"


def _is_checkpoint(name: str) -> bool:
    return name == FINISHED or _STEP.fullmatch(name) is not None
