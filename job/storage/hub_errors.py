"""What huggingface_hub raises, as errors of the job: which exit code it means, and what to do about it.

The originals are not chained: their messages quote what the server said, and their requests hold the token.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, whichever this version of the library uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from job.errors import ConfigError, DeniedError, JobError, NotFoundError, UnavailableError
from job.log import redact
from job.storage.paths import disk_error

READ_HINT = "check the name; if it is private or gated, set HF_TOKEN to a token that may read it"
WRITE_HINT = "set HF_TOKEN to a token that may write there: one with the role write, or fine-grained with write access"
_NETWORK_HINT = "check HF_ENDPOINT and the network; the Hub may be down"
_XET_HINT = "let the job reach the storage's hosts, or set HF_HUB_DISABLE_XET=1 to upload without it"
_LONGEST_REASON = 300
_WAIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")  # of the header `ratelimit`: none remaining, and for how long


class UnreadableError(ConfigError):
    """An answer that no Hub gives."""


@contextmanager
def hub_errors(label: str, repo_type: str, *, hint: str = READ_HINT) -> Iterator[None]:
    """Turn what the library raises into a JobError; `label` names setting and URI, `hint` remedies missing rights."""
    try:
        yield
    except (HTTPError, OSError, EntryNotFoundError, ValueError, RuntimeError) as error:
        if isinstance(error, NotImplementedError | RecursionError):
            raise
        raise describe_hub_error(error, label, repo_type, hint) from None


def describe_hub_error(error: BaseException, label: str, repo_type: str, hint: str) -> JobError:
    """Return what an exception of the library means."""
    endpoint = urlsplit(constants.ENDPOINT).hostname
    if isinstance(error, OSError) and error.errno:
        return disk_error(error, Path(constants.HF_HUB_CACHE), label)
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return describe_hub_error(error.__cause__, label, repo_type, hint)
    if isinstance(error, LocalTokenNotFoundError):
        return DeniedError(f"{label}: there is no token for {endpoint}", hint=hint)
    if isinstance(error, GatedRepoError):
        return DeniedError(f"{label}: the repository is gated", hint="ask for access on its page, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return NotFoundError(f"{label}: no such {repo_type} on {endpoint}", hint=hint)
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(f"{label}: no such revision", hint="name a branch, a tag or a commit")
    if isinstance(error, OfflineModeIsEnabled):
        return UnavailableError(f"{label}: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return NotFoundError(f"{label}: a file is gone from the Hub", hint="start again")
    if isinstance(error, HfHubHTTPError):
        return _of_answer(error, label, endpoint, hint)
    if isinstance(error, HFValidationError):
        return ConfigError(f"{label}: not a possible name on the Hub", hint="write hf://org/name")
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError | OSError):  # a thread's, by LFS
        return describe_hub_error(error.__cause__, label, repo_type, hint)
    if isinstance(error, RuntimeError) or type(error) in (ConnectionError, TimeoutError):  # Xet's, whatever it met
        return UnavailableError(f"{label}: the Hub's storage, Xet, can't be reached or is not served", hint=_XET_HINT)
    if isinstance(error, PermissionError):
        return DeniedError(f"{label}: the Hub's storage, Xet, refuses the token", hint=hint)
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return ConfigError(f"{label}: the Hub refuses the model card: {_shorten(str(error))}", hint="report it, please")
    if isinstance(error, ValueError):
        return UnreadableError(f"{label}: {endpoint} does not answer like a Hub", hint="check HF_ENDPOINT")
    return UnavailableError(f"{label}: {endpoint} can't be reached ({type(error).__name__})", hint=_NETWORK_HINT)


def _of_answer(error: HfHubHTTPError, label: str, endpoint: str | None, hint: str) -> JobError:
    status, source = error.response.status_code, f"from {endpoint}"
    if status in (401, 403):
        return DeniedError(f"{label}: access denied (HTTP {status}, {source}){_reason(error)}", hint=hint)
    if status == 404:
        return NotFoundError(f"{label}: not found (HTTP 404, {source})", hint=hint)
    if status in (409, 412):
        return UnavailableError(
            f"{label}: another writer was faster (HTTP {status}, {source})", hint="start again when nobody writes there"
        )
    if status in (408, 429) or status >= 500:
        return UnavailableError(
            f"{label}: the Hub can't answer now (HTTP {status}, {source})",
            hint=_NETWORK_HINT,
            retry_after_s=_find_wait(error.response.headers),
        )
    return ConfigError(f"{label}: the Hub refuses the request (HTTP {status}, {source}){_reason(error)}", hint=hint)


def _reason(error: HfHubHTTPError) -> str:
    """Return what the server gives as its reason, such as a full quota."""
    return f": {_shorten(error.server_message)}" if error.server_message else ""


def _shorten(reason: str) -> str:
    return redact(" ".join(reason.split()))[:_LONGEST_REASON]


def _find_wait(headers: Mapping[str, str]) -> float:
    """Return for how many seconds a server that limits requests asks to wait, 0 where it doesn't."""
    after = headers.get("retry-after", "")
    if after.isdigit():
        return float(after)
    found = _WAIT.search(headers.get("ratelimit", ""))
    return float(found[1]) if found else 0.0
