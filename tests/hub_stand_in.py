"""A stand-in for the read side of the Hugging Face Hub: it serves repositories from a folder on loopback.

It is not the Hub. It answers what huggingface_hub 2.4 asks when it lists and downloads, in the forms that the library
expects, and it can send errors and damaged bodies on purpose. Repositories lie in `models/org/name` and
`datasets/org/name`; each has one commit, named by its content and by `main`. Files named like weights are "LFS" files:
their ETag is a sha256 and their download is a redirect.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = {".safetensors", ".bin", ".parquet"}


class HubStandIn:
    """A running stand-in; use it as a context manager, and `environment()` in the process that downloads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gated: set[str] = set()  # repositories whose files are refused
        self.fail_next = 0  # answer so many requests with 503
        self.flip_next = 0  # flip a byte in so many downloads
        self.cut_next = 0  # end so many downloads half way
        self.requests: list[str] = []
        self.token_seen = False
        self.lock = threading.Lock()
        stand_in = self

        class Handler(_Handler):
            hub = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # another name: the library stops at a redirect to another host

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the variables with which a process uses this stand-in and a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add(self, kind: str, repo: str, files: dict[str, bytes]) -> str:
        """Create or change a repository; `kind` is models or datasets. Returns its commit."""
        for name, content in files.items():
            path = self.folder / kind / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self.commit(self.folder / kind / repo)

    def commit(self, root: Path) -> str:
        digest = hashlib.sha1()
        for name, path in self.files(root).items():
            digest.update(f"{name} {hashlib.sha1(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def files(self, root: Path) -> dict[str, Path]:
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def take(self, counter: str) -> bool:
        """Use up one planned fault, if one is left."""
        with self.lock:
            left = int(vars(self)[counter])
            vars(self)[counter] = max(0, left - 1)
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.token_seen |= "authorization" in self.headers
        if self.hub.take("fail_next"):
            self._error(503, "", "try later")
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/").split("/"))
        elif path.startswith("/cdn/"):
            self._body((self.hub.folder / path.removeprefix("/cdn/")).read_bytes(), {})
        else:
            kind = "datasets" if path.startswith("/datasets/") else "models"
            self._resolve(kind, path.removeprefix("/datasets").strip("/").split("/", 4))

    def _root(self, kind: str, repo: str) -> Path | None:
        root = self.hub.folder / kind / repo
        if root.is_dir():
            return root
        self._error(404, "RepoNotFound", "Repository not found")
        return None

    def _api(self, parts: list[str]) -> None:
        kind, repo, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        root = self._root(kind, repo)
        if root is None:
            return
        if rest == ["auth-check"]:
            if repo in self.hub.gated:
                self._error(403, "GatedRepo", "Access to this repository is restricted")
            else:
                self._json({})
        elif not rest or (rest[0] in ("revision", "tree") and self._known(root, "/".join(rest[1:]))):
            entries = [_describe(name, path) for name, path in self.hub.files(root).items()]
            if rest and rest[0] == "tree":
                self._json([{"type": "file", "path": e["rfilename"], "oid": e["blobId"], **e} for e in entries])
            else:
                gated = "manual" if repo in self.hub.gated else False
                self._json({"id": repo, "sha": self.hub.commit(root), "siblings": entries, "gated": gated, "tags": []})
        else:
            self._error(404, "RevisionNotFound", "Invalid rev id")

    def _known(self, root: Path, revision: str) -> bool:
        return revision in ("main", self.hub.commit(root))

    def _resolve(self, kind: str, parts: list[str]) -> None:
        org, name, _, revision, file = parts
        root = self._root(kind, f"{org}/{name}")
        if root is None:
            return
        if f"{org}/{name}" in self.hub.gated:
            self._error(403, "GatedRepo", "Access to this repository is restricted")
        elif not self._known(root, revision):
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif not (root / file).is_file():
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            self._send_file(root, file)

    def _send_file(self, root: Path, file: str) -> None:
        entry = _describe(file, root / file)
        commit = {"X-Repo-Commit": self.hub.commit(root)}
        if "lfs" in entry:
            location = "/cdn/" + (root / file).relative_to(self.hub.folder).as_posix()
            linked = {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["sha256"]}"'}
            self._head(302, {**commit, **linked, "Location": self.hub.cdn + location, "Content-Length": "0"})
        else:
            self._body((root / file).read_bytes(), {**commit, "ETag": f'"{entry["blobId"]}"'})

    def _body(self, content: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        part = content[start:]
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._head(206 if start else 200, {**headers, "Content-Length": str(len(part))})
        if self.command == "HEAD":
            return
        is_file = "/api/" not in self.path
        if is_file and self.hub.take("flip_next"):
            part = bytes([part[0] ^ 1]) + part[1:]
        if is_file and self.hub.take("cut_next"):
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def _json(self, answer: object) -> None:
        self._body(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _describe(name: str, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": oid}
    if path.suffix in LFS_SUFFIXES:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
    return entry
