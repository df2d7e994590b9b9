"""How the Hub's stand-in answers each request. Paths, parameters and answers are those that huggingface_hub 2.4 sends
and expects."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import StoredBlob, StoredCommit, StoredRepository, is_lfs, make_blob, make_commit

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn


class HubHandler(BaseHTTPRequestHandler):
    hub: "HubStandIn"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.parameters = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.sent = self._read_body()
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        self.has_token = "authorization" in self.headers
        self.hub.token_seen |= self.has_token
        if self.hub.take("fail_next"):
            self._error(503, "", "try later")
        elif self.command == "PUT":
            self._store_lfs(parts[-1])
        elif parts[0] == "cdn":
            self._body(self.hub.lfs_content(parts[1], parts[2]), {})
        elif parts[-2:] == ["objects", "batch"]:
            self._lfs_batch()
        elif parts[0] == "api" and parts[1] not in ("models", "datasets"):
            self._general(parts[1:])
        elif parts[0] == "api":
            self._api(parts[1], "/".join(parts[2:4]), parts[4:])
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            org, name, _, revision, *file = parts[1:] if kind == "datasets" else parts
            self._resolve(kind, f"{org}/{name}", revision, "/".join(file))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # -- accounts ------------------------------------------------------------------------------------------------------

    def _general(self, parts: list[str]) -> None:
        if parts == ["whoami-v2"]:
            if self.has_token and self.hub.who:
                self._json(self.hub.who)
            else:
                self._error(401, "", "Invalid credentials in Authorization header")
        elif parts == ["validate-yaml"]:
            card = json.loads(self.sent)["content"]
            if self.hub.take("fail_card_next"):
                self._error(503, "", "try later")
            elif any(f"license: {name}\n" in card for name in self.hub.bad_licenses):
                self._json({"errors": [{"message": '"license" must be one of those that we know'}]}, status=400)
            else:
                self._json({"errors": [], "warnings": []})
        elif parts == ["repos", "create"]:
            self._create(json.loads(self.sent))
        else:
            self._error(404, "", "no such thing")

    def _create(self, wish: dict[str, Any]) -> None:
        repo = f"{wish['organization'] or self.hub.who['name']}/{wish['name']}"
        key = (f"{wish.get('type', 'model')}s", repo)
        if repo in self.hub.read_only or not self.has_token:
            self._error(403, "", f"You don't have the rights to create a model under the namespace {repo}")
            return
        with self.hub.lock:
            is_there = key in self.hub.repositories
            self.hub.repositories.setdefault(key, StoredRepository(is_private=wish.get("visibility") == "private"))
        answer = {"url": f"{self.hub.endpoint}/{repo}"}
        self._json(answer, status=409 if is_there else 200)

    # -- repositories --------------------------------------------------------------------------------------------------

    def _find(self, kind: str, repo: str) -> StoredRepository | None:
        found = self.hub.repositories.get((kind, repo))
        if found is not None and (self.has_token or not found.is_private):
            return found
        self._error(404 if self.has_token else 401, "RepoNotFound", "Repository not found")
        return None

    def _find_commit(self, stored: StoredRepository, revision: str) -> StoredCommit | None:
        commit = stored.find(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api(self, kind: str, repo: str, rest: list[str]) -> None:
        stored = self._find(kind, repo)
        if stored is None:
            return
        question, revision = (rest[0], rest[1] if len(rest) > 1 else "main") if rest else ("revision", "main")
        if question == "auth-check":
            self._auth_check(stored, repo, is_write=revision == "write")
        elif question == "refs":
            heads = {True: stored.refs, False: stored.tags}
            listed = {
                is_branch: [{"name": name, "ref": f"refs/{name}", "targetCommit": c.oid} for name, c in named.items()]
                for is_branch, named in heads.items()
            }
            branches = [ref for ref in listed[True] if not ref["name"].startswith("refs/pr/")]
            self._json({"branches": branches, "tags": listed[False], "converts": []})
        elif question == "discussions":
            self._discussions(stored, repo)
        elif question == "branch":
            self._branch(stored, repo, revision)
        elif (commit := self._find_commit(stored, revision)) is None:
            return
        elif question == "revision":
            entries = [blob.describe(name) for name, blob in commit.files.items()]
            gated = "manual" if stored.is_gated else False
            answer = {"id": repo, "sha": commit.oid, "siblings": entries, "gated": gated, "tags": []}
            self._json(answer | {"private": stored.is_private})
        elif question == "tree":
            entries = [blob.describe(name) for name, blob in commit.files.items()]
            self._json([{"type": "file", "path": e["rfilename"], "oid": e["blobId"], **e} for e in entries])
        elif repo in self.hub.read_only and "create_pr" not in self.parameters:
            self._error(403, "", "You don't have write access")
        elif question == "preupload":
            self._preupload(commit)
        elif question == "commit":
            self._commit(stored, repo, revision, commit)
        else:
            self._error(404, "", "no such thing")

    def _auth_check(self, stored: StoredRepository, repo: str, *, is_write: bool) -> None:
        if stored.is_gated:
            self._error(403, "GatedRepo", "Access to this repository is restricted")
        elif is_write and not self.hub.knows_write_check:
            self._error(404, "", "Sorry, we can't find the page you are looking for.")
        elif is_write and (repo in self.hub.read_only or not self.has_token):
            self._error(403, "", "You don't have write access")
        else:
            self._json({})

    def _discussions(self, stored: StoredRepository, repo: str) -> None:
        common = {
            "author": {"name": "camellia"},
            "createdAt": "2026-11-01T12:00:00.000Z",
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": repo, "type": "model"},
        }
        listed = [{"title": title, "num": index + 1, **common} for index, title in enumerate(stored.pull_requests)]
        start = 10 * int(self.parameters.get("p", 0))
        page = listed[::-1][start : start + 10]
        self._json({"discussions": page, "count": len(listed), "start": start})

    def _branch(self, stored: StoredRepository, repo: str, branch: str) -> None:
        start = stored.find(json.loads(self.sent).get("startingPoint", "main"))
        if repo in self.hub.read_only:
            self._error(403, "", "You don't have write access")
        elif branch in stored.refs:
            self._error(409, "", "Reference already exists")
        elif start is None:
            self._error(404, "RevisionNotFound", "Invalid starting point")
        else:
            stored.refs[branch] = start
            self._json({})

    # -- uploads -------------------------------------------------------------------------------------------------------

    def _preupload(self, commit: StoredCommit) -> None:
        answers = []
        for file in json.loads(self.sent)["files"]:
            stored = commit.files.get(file["path"])
            mode = "lfs" if is_lfs(file["path"]) else "regular"
            entry = {} if stored is None else stored.describe(file["path"])
            oid = entry["lfs"]["sha256"] if "lfs" in entry else entry.get("blobId")
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _lfs_batch(self) -> None:
        answers = []
        for wanted in json.loads(self.sent)["objects"]:
            content = self.hub.lfs.get(wanted["oid"])
            is_there = content is not None and hashlib.sha256(content).hexdigest() == wanted["oid"]
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            answers.append(wanted | ({} if is_there else {"actions": upload}))
        self._json({"transfer": "basic", "objects": answers})

    def _store_lfs(self, oid: str) -> None:
        if hashlib.sha256(self.sent).hexdigest() != oid:
            self._error(400, "", "The content is not what its name says")
            return
        self.hub.lfs[oid] = self.sent
        self._json({})

    def _commit(self, stored: StoredRepository, repo: str, revision: str, head: StoredCommit) -> None:
        if self.hub.take("busy_next"):
            self._head(429, {"Retry-After": "1", "Content-Length": "0"})
            return
        if self.hub.take("fail_commit_next"):
            self._error(500, "", "Internal error")
            return
        if self.hub.overtake_next:
            files = self.hub.overtake_next.pop(0)
            self.hub.add("models", repo, files, revision)
            head = stored.refs[revision]
        lines = [json.loads(line) for line in self.sent.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head.oid) != head.oid:
            self._error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        files = self._apply(head.files, lines[1:])
        if files is None:
            return
        if header["description"]:
            raise AssertionError("descriptions are not kept")
        made = make_commit(header["summary"], files, head)
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.oid}"}
        if "create_pr" in self.parameters:
            number = stored.add_pull_request(header["summary"], made)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        else:
            stored.refs[revision] = made
        if self.hub.take("lose_commit_next"):
            self.close_connection = True
        else:
            self._json(answer)

    def _apply(self, files: dict[str, StoredBlob], operations: list[dict[str, Any]]) -> dict[str, StoredBlob] | None:
        files = dict(files)
        for operation in operations:
            value = operation["value"]
            name = value["path"]
            if operation["key"] == "deletedFile":
                if files.pop(name, None) is None:
                    self._error(404, "EntryNotFound", "A file with this name doesn't exist")
                    return None
                continue
            if operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self._error(400, "", "LFS pointer points to a file that does not exist")
                    return None
                blob = StoredBlob(self.hub.lfs[value["oid"]], value["oid"], is_lfs=True)
            else:
                blob = make_blob(name, base64.b64decode(value["content"]))
            files[name] = self._damage(blob) if self.hub.take("damage_next") else blob
        return files

    def _damage(self, blob: StoredBlob) -> StoredBlob:
        damaged = bytes([blob.content[0] ^ 1]) + blob.content[1:]
        if blob.is_lfs:
            self.hub.lfs[blob.sha256] = damaged
        return StoredBlob(damaged, blob.sha256, blob.is_lfs)

    # -- downloads -----------------------------------------------------------------------------------------------------

    def _resolve(self, kind: str, repo: str, revision: str, file: str) -> None:
        stored = self._find(kind, repo)
        if stored is None:
            return
        if stored.is_gated:
            self._error(403, "GatedRepo", "Access to this repository is restricted")
            return
        commit = self._find_commit(stored, revision)
        if commit is None:
            return
        if file not in commit.files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        blob = commit.files[file]
        entry = blob.describe(file)
        headers = {"X-Repo-Commit": commit.oid}
        if blob.is_lfs:
            linked = {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{blob.sha256}"'}
            location = f"{self.hub.cdn}/cdn/{commit.oid}/{file.replace('/', '%2F')}"
            self._head(302, {**headers, **linked, "Location": location, "Content-Length": "0"})
        else:
            self._body(blob.content, {**headers, "ETag": f'"{entry["blobId"]}"'})

    # -- answers -------------------------------------------------------------------------------------------------------

    def _body(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        part = content[start:]
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._head(206 if start else status, {**headers, "Content-Length": str(len(part))})
        if self.command == "HEAD":
            return
        is_file = "/api/" not in self.path and self.command == "GET"
        if is_file and self.hub.take("flip_next"):
            part = bytes([part[0] ^ 1]) + part[1:]
        if is_file and self.hub.take("cut_next"):
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def _json(self, answer: object, status: int = 200) -> None:
        self._body(json.dumps(answer).encode(), {"Content-Type": "application/json"}, status)

    def _error(self, status: int, code: str, message: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
