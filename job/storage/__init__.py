"""One small interface over the places where files live: `s3://` (s3.py), `hf://` (hub.py) and paths (local.py).

A `Store` is opened on one URI. Reading: `find` lists what the URI names, `fetch` brings one file here, verified, and
writes it under a temporary name before renaming it. Writing: the URI is a folder (a "slot"), into which `put` places
one file at a time. boto3 is imported in s3*.py only, huggingface_hub in hub.py only, and only when a URI
needs them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class Store(Protocol):
    """A place opened at one URI. Errors are `JobError`s that name the URI and the remedy."""

    uri: str

    def find(self) -> list[StoredFile]:
        """List what the URI names (one file, everything under a prefix, or a glob's matches), sorted by path.

        Raises NotFoundError when nothing is there.
        """
        ...

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress) -> list[Path]:
        """Make the files readable here, in parallel and verified, and return their paths in the same order.

        S3 downloads into the folder, under the files' relative paths. The Hub uses its cache (HF_HOME), and a local
        store the files in place: they leave the folder empty. Raises UnavailableError where a file changed after
        `find`, or arrives damaged every time.
        """
        ...

    def revision(self, files: list[StoredFile]) -> str:
        """Identify this version of the content: the Hub's commit, or a sha256 over paths with sizes and versions.

        S3 hashes (path, size, etag), a local store (path, sha256 of the content).
        """
        ...

    def put(self, source: Path, path: str) -> None:
        """Place a local file at `path` in the slot, whole or not at all."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return a small file of the slot, or None where there is none."""
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


def open_store(uri: str, *, setting: str) -> Store:
    """Open the place that a URI names; `setting` is the variable that it came from, for messages.

    Raises ConfigError for a scheme that nothing serves.
    """
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme == "s3":
        from job.storage.s3 import S3Store

        return S3Store(uri, setting=setting)
    if scheme == "hf":
        from job.storage.hub import HubStore

        return HubStore(uri, setting=setting)
    if scheme == "":
        from job.storage.local import LocalStore

        return LocalStore(uri, setting=setting)
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
