"""Files on the Hugging Face Hub: the only module that imports huggingface_hub.

A revision is resolved to its commit once, in `find`; everything is then downloaded at that commit, into the Hub's own
cache (HF_HOME), and verified against the git or LFS hash that the Hub lists. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
are read by the library itself.
"""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, whichever this version of the library uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling

from job.errors import ConfigError, DeniedError, JobError, NotFoundError, UnavailableError
from job.storage import Progress, StoredFile
from job.storage.paths import compile_pattern, disk_error, disk_errors, is_pattern, pattern_folder
from job.storage.transfer import TRIES, Task, retry_delay_s, run_tasks

LISTING_TIMEOUT_S = 60
_URI = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_OTHER_KINDS = ("spaces", "buckets", "datasets", "models")
_TOKEN_HINT = "check the name; if it is private or gated, set HF_TOKEN to a token that may read it"  # noqa: S105
_NETWORK_HINT = "check HF_ENDPOINT and the network; the Hub may be down"


class HubStore:
    """`hf://org/name[@revision]`, a model, or `hf://datasets/org/name[@revision][/path or glob]`; for reading only."""

    def __init__(self, uri: str, *, setting: str) -> None:
        self.uri = uri
        self.label = f"{setting}={uri}"
        match = _URI.fullmatch(uri)
        if match is None or match["repo"].split("/")[0] in _OTHER_KINDS:
            raise ConfigError(
                f"{self.label}: not a place on the Hub",
                hint="write hf://org/name[@revision] or hf://datasets/org/name[@revision][/path]",
            )
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise ConfigError(f"{self.label}: HF_ENDPOINT is not a URL", hint="write https://host")
        self.repo = match["repo"]
        self.repo_type = "dataset" if match["datasets"] else "model"
        self._revision = unquote(match["revision"]) if match["revision"] else None
        self._path = (match["path"] or "").rstrip("/")
        self._base = f"hf://{match['datasets'] or ''}{self.repo}"
        self._api = HfApi()

    def find(self) -> list[StoredFile]:
        """List the files at the commit that the revision names now; those whose name starts with a dot are left out."""
        info = self._info()
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        chosen = self._choose(list(siblings))
        if not chosen:
            raise NotFoundError(
                f"{self.label}: none of the repository's {len(siblings)} files is meant",
                hint="check the path or glob; '*' stays within one folder, '**' crosses folders",
            )
        files = [_describe(siblings[name], path, f"{self._base}@{info.sha}/{name}") for name, path in chosen.items()]
        return sorted(files, key=lambda file: file.path)

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress) -> list[Path]:
        """Download the files at their commit into the Hub's cache, unless they are there, and return their paths."""
        stop = threading.Event()
        paths: dict[str, Path] = {}

        def fetch_one(file: StoredFile) -> list[Task]:
            paths[file.uri] = self._fetch(file, progress, stop)
            return []

        run_tasks([partial(fetch_one, file) for file in files], stop)
        return [paths[file.uri] for file in files]

    def revision(self, files: list[StoredFile]) -> str:
        """Return the commit that the files were listed at."""
        commit, _ = self._commit_and_name(files[0])
        return commit

    def put(self, source: Path, path: str) -> None:
        """Refuse."""
        self._refuse()

    def read(self, path: str) -> bytes | None:
        """Refuse."""
        self._refuse()

    def delete(self, path: str) -> None:
        """Refuse."""
        self._refuse()

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        """Refuse."""
        self._refuse()

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        """Refuse."""
        self._refuse()

    def check_writable(self) -> None:
        """Refuse."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{self.label}: publishing to the Hub is not served yet; use s3:// or a path",
            hint="use s3://bucket/prefix or a path",
        )

    def _info(self) -> ModelInfo | DatasetInfo:
        for tries in range(1, TRIES + 1):
            try:
                with self._hub_errors():
                    info: ModelInfo | DatasetInfo = self._api.repo_info(  # type: ignore[assignment]  # not a space
                        self.repo,
                        repo_type=self.repo_type,
                        revision=self._revision,
                        files_metadata=True,
                        timeout=LISTING_TIMEOUT_S,
                    )
                    if info.gated:
                        # Anyone may list a gated repository: whether its files may be read shows here already.
                        self._api.auth_check(self.repo, repo_type=self.repo_type)
                    return info
            except UnavailableError:
                if tries == TRIES or constants.HF_HUB_OFFLINE:
                    raise
                time.sleep(retry_delay_s(tries))
        raise AssertionError  # the last try returned or raised

    def _choose(self, names: list[str]) -> dict[str, str]:
        """Return {name in the repository: path relative to the place that was opened}."""
        if self._path in names:
            return {self._path: self._path.rsplit("/", 1)[-1]}
        if is_pattern(self._path):
            folder = pattern_folder(self._path)
            pattern = compile_pattern(self._path)
            return {name: name.removeprefix(folder) for name in names if pattern.fullmatch(name)}
        folder = f"{self._path}/" if self._path else ""
        below = {name: name.removeprefix(folder) for name in names if name.startswith(folder)}
        return {name: path for name, path in below.items() if not any(part[0] == "." for part in path.split("/"))}

    def _commit_and_name(self, file: StoredFile) -> tuple[str, str]:
        commit, _, name = file.uri.removeprefix(f"{self._base}@").partition("/")
        return commit, name

    def _fetch(self, file: StoredFile, progress: Progress, stop: threading.Event) -> Path:
        commit, name = self._commit_and_name(file)
        bar = _Bar(progress, stop)
        for tries in range(1, TRIES + 1):
            with self._hub_errors():
                path = Path(
                    hf_hub_download(
                        self.repo,
                        name,
                        repo_type=self.repo_type,
                        revision=commit,
                        force_download=tries > 1,
                        tqdm_class=cast(Any, bar),
                    )
                )
            with disk_errors(path.parent, self.label):
                intact = _hash_like(path, file) == file.etag
            if intact:
                progress(file.size_bytes - bar.counted_bytes)  # a cached file was not counted
                return path
            if stop.wait(retry_delay_s(tries)):
                break
        raise UnavailableError(
            f"{self.label}: {name} arrived damaged, {TRIES} times over", hint="the network damages it; try again later"
        )

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        # Not chained: the library's messages quote what the server said, and its requests hold the token.
        try:
            yield
        except (HTTPError, OSError, EntryNotFoundError, ValueError) as error:
            raise self._job_error(error) from None

    def _job_error(self, error: Exception) -> JobError:
        endpoint = urlsplit(constants.ENDPOINT).hostname
        if isinstance(error, OSError) and error.errno:
            return disk_error(error, Path(constants.HF_HUB_CACHE), self.label)
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
            return self._job_error(error.__cause__)
        if isinstance(error, GatedRepoError):
            return DeniedError(
                f"{self.label}: the repository is gated", hint="ask for access on its page, then set HF_TOKEN"
            )
        if isinstance(error, RepositoryNotFoundError):
            return NotFoundError(f"{self.label}: no such {self.repo_type} on {endpoint}", hint=_TOKEN_HINT)
        if isinstance(error, RevisionNotFoundError):
            return NotFoundError(f"{self.label}: no such revision", hint="name a branch, a tag or a commit")
        if isinstance(error, OfflineModeIsEnabled):
            return UnavailableError(f"{self.label}: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return NotFoundError(f"{self.label}: a file is gone from the Hub", hint="start again")
        if isinstance(error, HfHubHTTPError):
            return self._of_status(error.response.status_code, f"from {endpoint}")
        if isinstance(error, HFValidationError):
            return ConfigError(f"{self.label}: not a possible name on the Hub", hint="write hf://org/name")
        if isinstance(error, ValueError):
            return ConfigError(f"{self.label}: {endpoint} does not answer like a Hub", hint="check HF_ENDPOINT")
        return UnavailableError(
            f"{self.label}: {endpoint} can't be reached, or breaks off ({type(error).__name__})", hint=_NETWORK_HINT
        )

    def _of_status(self, status: int, source: str) -> JobError:
        if status in (401, 403):
            return DeniedError(f"{self.label}: access denied (HTTP {status}, {source})", hint=_TOKEN_HINT)
        if status == 404:
            return NotFoundError(f"{self.label}: not found (HTTP 404, {source})", hint=_TOKEN_HINT)
        if status in (408, 429) or status >= 500:
            return UnavailableError(
                f"{self.label}: the Hub can't answer now (HTTP {status}, {source})", hint=_NETWORK_HINT
            )
        return ConfigError(f"{self.label}: the Hub refuses the request (HTTP {status}, {source})", hint=_TOKEN_HINT)


def _describe(sibling: RepoSibling, path: str, uri: str) -> StoredFile:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
    return StoredFile(uri=uri, path=path, size_bytes=sibling.size or 0, etag=etag)


def _hash_like(path: Path, file: StoredFile) -> str:
    """Return the hash of a file that the Hub calls its ETag: sha256 of an LFS object, or git's sha1 of a blob."""
    if len(file.etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


class _Bar:
    """Stands where the library would draw a progress bar."""

    def __init__(self, progress: Progress, stop: threading.Event) -> None:
        self.counted_bytes = 0
        self._progress = progress
        self._stop = stop

    def __call__(self, *args: object, **kwargs: object) -> "_Bar":
        return self

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, size_bytes: float | None = 1) -> None:
        """Count bytes; ends the download from inside when all of them are to stop."""
        if self._stop.is_set():
            raise InterruptedError
        self.counted_bytes += int(size_bytes or 0)
        self._progress(int(size_bytes or 0))
