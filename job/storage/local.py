"""Files on this machine: a file, a folder, or a glob. Nothing is copied for reading; a slot is a folder."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from job.errors import ConfigError, DeniedError, NotFoundError, UnavailableError
from job.storage import PROBE_NAME, Arrived, Progress, StoredFile, digest_rows
from job.storage.paths import (
    atomic_file,
    check_path,
    compile_pattern,
    disk_errors,
    is_pattern,
    pattern_folder,
)


class LocalStore:
    """A path; `~` is the job's user's home, and hidden files are left out unless the path or glob names them."""

    takes_commits: Literal[False] = False

    def __init__(self, uri: str, *, setting: str) -> None:
        if not uri:
            raise ConfigError(f"{setting}: names no path", hint="write a file, a folder or a glob")
        self.uri = uri
        self.label = f"{setting}={uri}"
        try:
            self.path = Path(uri).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{self.label}: there is no such user's home", hint="write the whole path") from error

    def find(self) -> list[StoredFile]:
        """List the file, everything under the folder, or what the glob matches."""
        with self._read_errors():
            if self.path.is_file():
                return [_describe(self.path, self.path.name)]
            if self.path.is_dir():
                files = [_describe(path, name) for path, name in self._walk(self.path, "")]
                missing = "the folder holds no files"
            elif is_pattern(str(self.path)):
                files, missing = self._match()
            else:
                files, missing = [], "nothing is there"
        if not files:
            raise NotFoundError(
                f"{self.label}: {missing}", hint="check the path, and that its volume is mounted in the container"
            )
        return sorted(files, key=lambda file: file.path)

    def fetch(
        self, files: list[StoredFile], folder: Path, progress: Progress, arrived: Arrived | None = None
    ) -> list[Path]:
        """Return the paths of the files where they lie, after a look that they are still what `find` saw."""
        paths = []
        for file in files:
            path = Path(file.uri)
            with self._read_errors():
                if _version(path.stat()) != file.etag:
                    raise UnavailableError(
                        f"{self.label}: {path} changed while being read", hint="start again when nobody writes there"
                    )
                path.open("rb").close()
            progress(file.size_bytes)
            paths.append(path)
        return paths

    def revision(self, files: list[StoredFile]) -> str:
        """Return a sha256 over the paths and the sha256 of each content."""
        rows = []
        for file in files:
            with self._read_errors(), Path(file.uri).open("rb") as stream:
                rows.append((file.path, hashlib.file_digest(stream, "sha256").hexdigest()))
        return digest_rows(rows)

    def put(self, source: Path, path: str) -> None:
        """Copy a file into the slot; it appears there whole, and survives a power cut."""
        target = self.path / check_path(path, self.label)
        with source.open("rb") as reader, disk_errors(target.parent, self.label), atomic_file(target) as writer:
            shutil.copyfileobj(reader, writer, 2**20)

    def put_all(self, files: Sequence[tuple[Path, str]]) -> None:
        """Copy files so, one after the other."""
        for source, path in files:
            self.put(source, path)

    def read(self, path: str) -> bytes | None:
        """Return a file of the slot, or None where there is none."""
        target = self.path / check_path(path, self.label)
        with self._read_errors():
            try:
                return target.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        """Return a file of the slot with the sha256 of its content."""
        content = self.read(path)
        return None if content is None else (content, hashlib.sha256(content).hexdigest())

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        """Make a file that isn't there, or replace one while it is locked."""
        target = self.path / check_path(path, self.label)
        with disk_errors(target.parent, self.label):
            written = _create(target, content) if version is None else self._replace(path, content, version)
        return hashlib.sha256(content).hexdigest() if written else None

    def _replace(self, path: str, content: bytes, version: str) -> bool:
        target = self.path / path
        with _lock_file(target):
            found = self.read_version(path)
            if found is None or found[1] != version:
                return False
            with atomic_file(target) as writer:
                writer.write(content)
        return True

    def delete(self, path: str) -> None:
        """Remove a file of the slot, and the folders in the slot that are empty then."""
        target = self.path / check_path(path, self.label)
        with disk_errors(target.parent, self.label):
            try:
                target.unlink(missing_ok=True)
            except NotADirectoryError:
                return
        _remove_empty(target.parents[: len(target.relative_to(self.path).parts) - 1])

    def check_writable(self) -> None:
        """Write an empty file into the slot and remove it, with the folders that were made for it."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            with disk_errors(self.path, self.label), atomic_file(self.path / PROBE_NAME):
                pass
            self.delete(PROBE_NAME)
        finally:
            _remove_empty(missing)

    def _match(self) -> tuple[list[StoredFile], str]:
        whole = str(self.path)
        folder = pattern_folder(whole)
        below = whole.removeprefix(folder)
        pattern = compile_pattern(below)
        root = Path(folder or ".")
        if not root.is_dir():
            return [], f"there is no folder {root}"
        seen, files = 0, []
        for path, name in self._walk(root, below):
            seen += 1
            if pattern.fullmatch(name):
                files.append(_describe(path, name))
        return files, f"the glob matches none of {seen} files under {root}"

    def _walk(self, root: Path, pattern: str) -> Iterator[tuple[Path, str]]:
        """Yield (path, path relative to the root) of the files below, no deeper than the pattern reaches."""
        depth = pattern.count("/") if pattern and "**" not in pattern else None
        hidden_wanted = pattern.startswith(".") or "/." in pattern
        visited: set[str] = set()
        for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
            relative = Path(folder).relative_to(root)
            real = str(Path(folder).resolve())
            if real in visited:  # a link that leads back up
                folders.clear()
                continue
            visited.add(real)
            if depth is not None and len(relative.parts) >= depth:
                folders.clear()
            if not hidden_wanted:
                folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if (hidden_wanted or not name.startswith(".")) and path.is_file():
                    yield path, (relative / name).as_posix()

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.path
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in (errno.EACCES, errno.EPERM):
                raise DeniedError(
                    f"{self.label}: {place} can't be read ({reason})",
                    hint=f"let the job's user (uid {os.geteuid()}) read it",
                ) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR):
                raise NotFoundError(f"{self.label}: {place} is not there ({reason})", hint="check the path") from error
            raise UnavailableError(f"{self.label}: {place} can't be read ({reason})", hint="check the disk") from error


def _create(target: Path, content: bytes) -> bool:
    """Write a file, which appears whole; say whether there was none."""
    try:
        with atomic_file(target, replace=False) as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


@contextmanager
def _lock_file(target: Path) -> Iterator[None]:
    """Keep other processes from replacing a file for the block; nothing is locked where there is none.

    The lock is on the file itself, so that none is left behind, and is tried anew where a waiter got that of a file
    which was replaced meanwhile.
    """
    while True:
        try:
            stream = target.open("r+b")  # NFS locks nothing that is open for reading only
        except (FileNotFoundError, NotADirectoryError):
            yield
            return
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_still(stream, target):
                yield
                return


def _is_still(stream: BinaryIO, target: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), target.stat())
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, each the parent of the one before it, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.ENOENT:
                return


def _describe(path: Path, name: str) -> StoredFile:
    status = path.stat()
    return StoredFile(uri=str(path), path=name, size_bytes=status.st_size, etag=_version(status))


def _version(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _raise(error: OSError) -> None:
    raise error
