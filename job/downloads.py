"""Files fetched from a store into a folder that outlives the process, so that a retry on the same volume fetches only
what it doesn't have."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import InternalError
from job.log import format_bytes, logger, transfer_progress
from job.manifest import hash_file
from job.phases import phase
from job.storage import ReadableStore, StoredFile

_INDEX = "fetched.json"
_LARGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FetchedFile:
    """A file that is here: where it came from, and where it lies."""

    source: StoredFile
    path: Path


class Downloads:
    """A folder for some files of a store, with an index that says which version of each was fetched and verified.

    Whatever else lies in the folder is deleted, so that it must be one of the job's own. Stores whose files lie
    elsewhere (see `ReadableStore.fetch`) leave it empty. Raises InternalError for a folder that somebody else has
    filled.
    """

    def __init__(self, folder: Path, store: ReadableStore, files: list[StoredFile]) -> None:
        self._folder = folder
        self._store = store
        if not (folder / _INDEX).exists() and folder.is_dir() and any(folder.iterdir()):
            raise InternalError(f"{folder} holds files that the job has not put there")
        self._lock = threading.Lock()
        self._index = _read_index(folder / _INDEX)
        self._write_index()
        self._delete_all_but({file.path for file in files if self._is_here(file)})

    def fetch(self, files: list[StoredFile], label: str) -> list[FetchedFile]:
        """Make the files readable here, in their order; one that was fetched before, and is unchanged on both sides,
        stays as it is. What came before an error, or a kill, is kept: large files one by one, as they come. Raises what
        the store's `fetch` raises."""
        paths = {file.path: self._folder / file.path for file in files if self._is_here(file)}
        missing = [file for file in files if file.path not in paths]
        if paths:
            kept = format_bytes(sum(file.size_bytes for file in files if file.path in paths))
            logger.info("%s: %d of %d files, %s, were fetched before", label, len(paths), len(files), kept)
        if missing:
            with phase("download"), transfer_progress(label, sum(file.size_bytes for file in missing)) as progress:
                fetched = self._store.fetch(missing, self._folder, progress, self._remember_large)
            paths |= {file.path: path for file, path in zip(missing, fetched, strict=True)}
            self._remember(missing, fetched)
        return [FetchedFile(file, paths[file.path]) for file in files]

    def hash_file(self, file: FetchedFile) -> str:
        """Return the sha256 of a fetched file's content, which is read once for each version of it."""
        entry, stamp = self._index.get(str(file.path), {}), _stamp(file.path)
        if entry.get("stamp") == stamp and "sha256" in entry:
            return str(entry["sha256"])
        with phase("download"):
            digest = hash_file(file.path)
        self._index[str(file.path)] = {**entry, "stamp": stamp, "sha256": digest}
        self._write_index()
        return digest

    def _is_here(self, file: StoredFile) -> bool:
        path = self._folder / file.path
        entry = self._index.get(str(path), {})
        return (entry.get("uri"), entry.get("etag")) == (file.uri, file.etag) and entry.get("stamp") == _stamp(path)

    def _delete_all_but(self, names: set[str]) -> None:
        wanted = {self._folder / name for name in names} | {self._folder / _INDEX}
        for path in sorted(self._folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in wanted:
                path.unlink()

    def _remember_large(self, file: StoredFile, path: Path) -> None:
        if file.size_bytes >= _LARGE_BYTES:
            with self._lock:
                self._remember([file], [path])

    def _remember(self, files: list[StoredFile], paths: list[Path]) -> None:
        for file, path in zip(files, paths, strict=True):
            if path.is_relative_to(self._folder):
                self._index[str(path)] = {"uri": file.uri, "etag": file.etag, "stamp": _stamp(path)}
        self._write_index()

    def _write_index(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(self._index), encoding="utf-8")
        partial.replace(self._folder / _INDEX)


def _read_index(path: Path) -> dict[str, dict[str, Any]]:
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _stamp(path: Path) -> list[int] | None:
    """Return what changes when a file's content does: size, time and inode; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]
