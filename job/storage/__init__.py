"""One small interface over the places where files live: `s3://` (s3.py), `hf://` (hub.py) and paths (local.py).

A place is opened at one URI. Reading (`ReadableStore`): `find` lists what the URI names, `fetch` brings the files here,
verified. Writing: the URI is a folder (a "slot"), into which a `Store` puts one file at a time, and a `CommitSlot` all
at once. boto3 is imported in s3*.py only, huggingface_hub in hub*.py only, and only when a URI needs them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from job.errors import ConfigError

PROBE_NAME = ".sft-job-probe"


@dataclass(frozen=True)
class StoredFile:
    """One file in a store: its own URI, its path relative to the place that was opened, and its size and version."""

    uri: str
    path: str
    size_bytes: int
    etag: str


# Where transferred bytes are reported, from several threads; a negative count takes back a try that failed.
Progress = Callable[[int], None]
# Told of each file that has come into the folder, and of its path there, from several threads.
Arrived = Callable[["StoredFile", Path], None]


class ReadableStore(Protocol):
    """A place opened at one URI, to read. Errors are `JobError`s that name the URI and the remedy."""

    uri: str

    def find(self) -> list[StoredFile]:
        """List what the URI names (one file, everything under a prefix, or a glob's matches), sorted by path.

        Raises NotFoundError when nothing is there.
        """
        ...

    def fetch(
        self, files: list[StoredFile], folder: Path, progress: Progress, arrived: Arrived | None = None
    ) -> list[Path]:
        """Make the files readable here, in parallel and verified, and return their paths in the same order.

        S3 downloads into the folder, under the files' relative paths. The Hub uses its cache (HF_HOME), and a local
        store the files in place: they leave the folder empty, and tell `arrived` nothing. Raises UnavailableError where
        a file changed after `find`, or arrives damaged every time.
        """
        ...

    def revision(self, files: list[StoredFile]) -> str:
        """Identify this version of the content: the Hub's commit, or a sha256 over paths with sizes and versions.

        S3 hashes (path, size, etag), a local store (path, sha256 of the content).
        """
        ...

    def read(self, path: str) -> bytes | None:
        """Return a small file of the slot, or None where there is none."""
        ...


class Store(ReadableStore, Protocol):
    """A place opened at one URI, to read and to write one file at a time."""

    @property
    def takes_commits(self) -> Literal[False]:
        """Say that it is no CommitSlot."""
        ...

    def put(self, source: Path, path: str) -> None:
        """Place a local file at `path` in the slot, whole or not at all."""
        ...

    def put_all(self, files: Sequence[tuple[Path, str]]) -> None:
        """Place local files at paths in the slot, each as `put` does; an error may leave some of them there."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file of the slot, and the folders in the slot that it leaves empty; one that isn't there is no
        error."""
        ...

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        """Return a small file of the slot, and what identifies this version of it; None where there is none.

        The same content may have the same version, so whoever compares versions must never write the same twice.
        """
        ...

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        """Write a small file of the slot if it still is of this version, or for None if there is none.

        Return its new version, or None when another writer was faster. Of several writers at the same moment, in
        whatever processes and on whatever machines, one is the first.
        """
        ...

    def check_writable(self) -> None:
        """Put a small object, `.sft-job-probe`, into the slot and delete it; raises what `put` would raise."""
        ...


@dataclass(frozen=True)
class Head:
    """What a CommitSlot held at a moment: the revision that was looked at, its commit (None: it isn't there yet), and
    the names of the files. A fresh one holds nothing but what another branch holds, too."""

    revision: str
    commit: str | None
    names: frozenset[str]
    is_fresh: bool = False


class CommitSlot(Protocol):
    """A slot into which all files go at once, by one commit on top of what was there: another writer is noticed."""

    uri: str

    @property
    def takes_commits(self) -> Literal[True]:
        """Say that it is no Store."""
        ...

    def check_writable(self) -> None:
        """Prove that a run may be published here, without leaving anything; raises what `commit` would raise."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return a small file of the slot, or None where there is none."""
        ...

    def make_room(self) -> None:
        """Create what the commit is to go to, where it isn't there."""
        ...

    def look(self) -> Head:
        """Return what is to be replaced."""
        ...

    def read_at(self, head: Head, path: str) -> bytes | None:
        """Return a small file as it was when `look` looked, or None where there was none."""
        ...

    def commit(self, head: Head, folder: Path, names: Sequence[str], stale: Sequence[str], message: str) -> Head:
        """Add files of a folder, and delete the stale ones, on top of what `look` saw; return what is there then.

        Raises UnavailableError when somebody else has committed meanwhile, and where it isn't known whether the commit
        was made: `look` tells.
        """
        ...

    def withdraw(self, head: Head, names: Sequence[str], message: str) -> None:
        """Delete files of what `commit` returned."""
        ...

    def find_damaged(self, head: Head, sha256_by_name: Mapping[str, str], scratch: Path) -> list[str]:
        """Read the files of a commit back, and return the names of those that are missing or differ."""
        ...


Slot = Store | CommitSlot


def open_store(uri: str, *, setting: str) -> ReadableStore:
    """Open the place that a URI names, to read; `setting` is the variable that it came from, for messages.

    Raises ConfigError for a scheme that nothing serves.
    """
    if uri.startswith("hf://"):
        from job.storage.hub import HubStore

        return HubStore(uri, setting=setting)
    return open_folder(uri, setting=setting)


def open_folder(uri: str, *, setting: str) -> Store:
    """Open the place that a URI names, to read and to write one file at a time.

    Raises ConfigError for a scheme that nothing serves so.
    """
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme == "s3":
        from job.storage.s3 import S3Store

        return S3Store(uri, setting=setting)
    if scheme == "":
        from job.storage.local import LocalStore

        return LocalStore(uri, setting=setting)
    if scheme == "hf":
        raise ConfigError(
            f"{setting}={uri}: the Hub takes whole commits only, of adapters that are done",
            hint="use s3://bucket/key, or a path",
        )
    raise ConfigError(
        f"{setting}={uri}: no store is known for {scheme}://",
        hint="use s3://bucket/key, hf://datasets/org/name, or a path",
    )


def digest_rows(rows: Sequence[tuple[str, ...]]) -> str:
    """Return a sha256 over rows of text, whatever their order; no two different lists of rows collide."""
    digest = hashlib.sha256()
    for row in sorted(rows):
        digest.update(repr(row).encode())
    return digest.hexdigest()
