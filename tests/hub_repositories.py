"""What the Hub's stand-in holds: repositories with branches, commits and pull requests, in memory."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".model"}
_FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class StoredBlob:
    """One file. `sha256` names it; the content may have been damaged since."""

    content: bytes
    sha256: str
    is_lfs: bool

    def describe(self, name: str) -> dict[str, Any]:
        oid = hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": len(self.content), "blobId": oid}
        if self.is_lfs:
            lfs = {"sha256": self.sha256, "oid": self.sha256, "size": len(self.content), "pointerSize": 130}
            entry["lfs"] = lfs
        return entry


def is_lfs(name: str) -> bool:
    return PurePosixPath(name).suffix in LFS_SUFFIXES


def make_blob(name: str, content: bytes) -> StoredBlob:
    return StoredBlob(content, hashlib.sha256(content).hexdigest(), is_lfs(name))


@dataclass(frozen=True)
class StoredCommit:
    oid: str
    title: str
    files: dict[str, StoredBlob]
    parent: "StoredCommit | None"

    def history(self) -> list["StoredCommit"]:
        """Return this commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


def make_commit(title: str, files: dict[str, StoredBlob], parent: StoredCommit | None) -> StoredCommit:
    tree = {name: hashlib.sha256(blob.content).hexdigest() for name, blob in files.items()}
    named = json.dumps([title, tree, parent and parent.oid], sort_keys=True)
    return StoredCommit(hashlib.sha1(named.encode()).hexdigest(), title, files, parent)


@dataclass
class StoredRepository:
    """A repository; `refs` are its branches by name, and `refs/pr/1`. It begins as those on the Hub do."""

    is_private: bool = False
    is_gated: bool = False
    refs: dict[str, StoredCommit] = field(default_factory=lambda: {"main": first_commit()})
    tags: dict[str, StoredCommit] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)  # the titles, by number; all are open

    def find(self, revision: str) -> StoredCommit | None:
        named = self.refs | self.tags
        if revision in named:
            return named[revision]
        commits = {commit.oid: commit for head in named.values() for commit in head.history()}
        return commits.get(revision)

    def add_pull_request(self, title: str, commit: StoredCommit) -> int:
        self.pull_requests.append(title)
        number = len(self.pull_requests)
        self.refs[f"refs/pr/{number}"] = commit
        return number


def first_commit() -> StoredCommit:
    return make_commit("initial commit", {name: make_blob(name, content) for name, content in _FIRST.items()}, None)
