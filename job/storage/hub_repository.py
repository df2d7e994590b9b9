"""One repository on the Hugging Face Hub: its listing at a revision, and its files, each verified as it is downloaded.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are read by the library itself.
"""

import hashlib
import re
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_download, set_client_factory
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling
from huggingface_hub.utils._http import default_client_factory

from job.errors import ConfigError, DamagedError, UnavailableError
from job.log import adopt_library_logs
from job.storage import Progress
from job.storage.hub_errors import READ_HINT, hub_errors
from job.storage.paths import disk_errors
from job.storage.transfer import TRIES, retry_delay_s

LISTING_TIMEOUT_S = 60
_ANSWER_TIMEOUT_S = 120.0  # a commit of many files takes the Hub a minute
_URI = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_OTHER_KINDS = ("spaces", "buckets", "datasets", "models")


def _open_client() -> Any:  # of httpx or httpx2, whichever this version of the library uses
    client = default_client_factory()
    client.timeout = _ANSWER_TIMEOUT_S  # by itself, the library waits for ever for a server that fell silent
    return client


set_client_factory(_open_client)
adopt_library_logs()


class HubRepository:
    """What `hf://org/name[@revision]` or `hf://datasets/org/name[@revision][/path]` names; `path` is what stands after
    it. Errors name the setting, and `hint` is their remedy for missing rights.

    Raises ConfigError for what names no place on the Hub.
    """

    def __init__(self, uri: str, *, setting: str, hint: str = READ_HINT) -> None:
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
        self.revision = unquote(match["revision"]) if match["revision"] else None
        self.path = (match["path"] or "").rstrip("/")
        self.base = f"hf://{match['datasets'] or ''}{self.repo}"
        self.hint = hint
        self.api = HfApi()

    def errors(self) -> AbstractContextManager[None]:
        """Return a context in which the library's exceptions become the job's."""
        return hub_errors(self.label, self.repo_type, hint=self.hint)

    def info(self, revision: str | None) -> ModelInfo | DatasetInfo:
        """Return what the Hub says of a revision, None for the newest: its commit, and its files with their hashes.

        Raises NotFoundError where there is no such repository or revision.
        """
        for tries in range(1, TRIES + 1):
            try:
                with self.errors():
                    return self._info(revision)
            except UnavailableError as error:
                if tries == TRIES or constants.HF_HUB_OFFLINE or error.retry_after_s:
                    raise
                time.sleep(retry_delay_s(tries))
        raise AssertionError  # the last try returned or raised

    def _info(self, revision: str | None) -> ModelInfo | DatasetInfo:
        info: ModelInfo | DatasetInfo = self.api.repo_info(  # type: ignore[assignment]  # not a space
            self.repo, repo_type=self.repo_type, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT_S
        )
        if info.gated:
            # Anyone may list a gated repository: whether its files may be read shows here already.
            self.api.auth_check(self.repo, repo_type=self.repo_type)
        return info

    def read(self, revision: str | None, path: str) -> bytes | None:
        """Return a small file at a revision, None where there is none; it isn't kept in the cache.

        Raises NotFoundError where there is no such repository or revision.
        """
        info = self.info(revision)
        return self.read_listed(info, path)

    def read_listed(self, info: ModelInfo | DatasetInfo, path: str) -> bytes | None:
        """Return a small file of a listing, None where there is none; it isn't kept in the cache."""
        sibling = next((sibling for sibling in info.siblings or [] if sibling.rfilename == path), None)
        if sibling is None:
            return None
        with tempfile.TemporaryDirectory(prefix="sft-job-") as folder:
            file = self.download(path, str(info.sha), etag_of(sibling), cache=Path(folder))
            return file.read_bytes()

    def download(
        self,
        name: str,
        commit: str,
        etag: str,
        *,
        bar: "Bar | None" = None,
        stop: threading.Event | None = None,
        cache: Path | None = None,
    ) -> Path:
        """Bring one file into a cache, by default the Hub's own (HF_HOME), unless it is there, and verify its hash.

        Raises DamagedError when it arrives damaged every time, and UnavailableError.
        """
        stop = stop or threading.Event()
        for tries in range(1, TRIES + 1):
            with self.errors():
                path = Path(
                    hf_hub_download(
                        self.repo,
                        name,
                        repo_type=self.repo_type,
                        revision=commit,
                        cache_dir=cache,
                        force_download=tries > 1,
                        tqdm_class=cast(Any, bar or Bar(lambda _: None, stop)),
                    )
                )
            with disk_errors(path.parent, self.label):
                if _hash_like(path, etag) == etag:
                    return path
            if stop.wait(retry_delay_s(tries)):
                break
        raise DamagedError(
            f"{self.label}: {name} arrived damaged, {TRIES} times over", hint="the network damages it; try again later"
        )


def etag_of(sibling: RepoSibling) -> str:
    """Return what the Hub calls the file's ETag: sha256 of an LFS object, or git's sha1 of a blob."""
    return sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""


def _hash_like(path: Path, etag: str) -> str:
    if len(etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


class Bar:
    """Stands where the library would draw a progress bar."""

    def __init__(self, progress: Progress, stop: threading.Event) -> None:
        self.counted_bytes = 0
        self._progress = progress
        self._stop = stop

    def __call__(self, *args: object, **kwargs: object) -> "Bar":
        """Return itself: the library believes to make a bar."""
        return self

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, size_bytes: float | None = 1) -> None:
        """Count bytes; ends the download from inside when all of them are to stop."""
        if self._stop.is_set():
            raise InterruptedError
        self.counted_bytes += int(size_bytes or 0)
        self._progress(int(size_bytes or 0))
