"""A stand-in for the Hugging Face Hub: repositories in memory, served on loopback to the real huggingface_hub.

It is not the Hub. It answers what huggingface_hub 2.4 asks when it lists, downloads, creates, uploads and commits, in
the forms that the library expects, and it can refuse, lose answers and damage bodies on purpose. Files named like
weights are "LFS" files: their ETag is a sha256, their download a redirect, and their upload LFS's basic transfer. Xet,
by which the library would rather upload, is switched off in `environment()`.
"""

import threading
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from hub_handler import HubHandler
from hub_repositories import StoredCommit, StoredRepository, make_blob, make_commit

OWNER = {
    "name": "camellia",
    "type": "user",
    "orgs": [{"name": "org", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}},
}


class HubStandIn:
    """A running stand-in; use it as a context manager, and `environment()` in the process that uses it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], StoredRepository] = {}  # by ("models", "org/name")
        self.lfs: dict[str, bytes] = {}  # by sha256
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self.token_seen = False
        self.reset()
        stand_in = self

        class Handler(HubHandler):
            hub = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # another name: the library stops at a redirect to another host

    def reset(self) -> None:
        """Plan no faults, and let every token do everything."""
        self.fail_next = 0  # answer so many requests with 503
        self.flip_next = 0  # flip a byte in so many downloads
        self.cut_next = 0  # end so many downloads half way
        self.busy_next = 0  # answer so many commits with 429, and ask to wait for a second
        self.fail_commit_next = 0  # answer so many commits with 500, and don't make them
        self.fail_card_next = 0  # answer so many model cards that are to be looked at with 503
        self.lose_commit_next = 0  # make so many commits, and break the connection without an answer
        self.damage_next = 0  # keep so many files of commits with a flipped byte
        self.overtake_next: list[dict[str, bytes]] = []  # what others commit just before the next commits
        self.who: dict[str, Any] = OWNER
        self.read_only: set[str] = set()  # repositories that the token may not write to
        self.knows_write_check = True
        self.bad_licenses: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, cache: object) -> dict[str, str]:
        """Return the variables with which a process uses this stand-in and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def repository(self, repo: str, kind: str = "models") -> StoredRepository:
        return self.repositories[kind, repo]

    def add(self, kind: str, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Create a repository or add files to it; `kind` is models or datasets. Returns the commit that holds them."""
        with self.lock:
            stored = self.repositories.setdefault((kind, repo), StoredRepository())
            head = stored.refs.get(branch) or stored.refs["main"]
            blobs = {name: make_blob(name, content) for name, content in files.items()}
            if any(head.files.get(name) != blob for name, blob in blobs.items()):
                head = make_commit("files added", head.files | blobs, head)
            stored.refs[branch] = head
            return head.oid

    def head(self, repo: str, revision: str = "main") -> StoredCommit:
        """Return the newest commit of a model's branch, tag or pull request."""
        return self.repository(repo).refs[revision]

    def read(self, repo: str, name: str, revision: str = "main") -> bytes:
        """Return a file of a model."""
        return self.head(repo, revision).files[name].content

    def take(self, counter: str) -> bool:
        """Use up one planned fault, if one is left."""
        with self.lock:
            left = int(vars(self)[counter])
            vars(self)[counter] = max(0, left - 1)
            return left > 0

    def lfs_content(self, commit: str, name: str) -> bytes:
        """Return what the CDN has for a file of a commit."""
        found = (repository.find(commit) for repository in self.repositories.values())
        return next(there.files[name].content for there in found if there is not None and name in there.files)
