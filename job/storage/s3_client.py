"""The S3 client of the default chain, and which end of the job each of S3's refusals leads to.

Of a server's answer only the error's code is shown: its message can hold an access key id, or the text that was to be
signed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from boto3.exceptions import S3UploadFailedError
from botocore import exceptions as boto
from botocore.config import Config
from botocore.loaders import Loader, create_loader
from botocore.utils import determine_content_length, parse_timestamp

from job.errors import ConfigError, DeniedError, InternalError, JobError, NotFoundError, UnavailableError
from job.storage.transfer import THREADS_FOR_SMALL, retry_delay_s

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
ATTEMPTS = 4  # of each request, by botocore: a closed port ends after 7 s at most
_SENT_AT_ONCE_BYTES = 256 * 2**10  # what servers read to the end even where they refuse it
_AWS_HOST = re.compile(r".*\.amazonaws\.(com|com\.cn|eu)|.*\.api\.aws")
_NO_CREDENTIALS = (boto.CredentialRetrievalError, boto.SSOError, boto.TokenRetrievalError, FileNotFoundError)
_BAD_PROFILE = (boto.ProfileNotFound, boto.ConfigNotFound, boto.ConfigParseError)
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they belong to this endpoint"
_SET = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role that the job may assume"
_RENEW = "get new credentials: these, or their AWS_SESSION_TOKEN, have expired or are not valid"
_CLOCK = "this machine's clock is wrong: set it, signatures are valid for minutes only"
_GRANT = "let these credentials list, read and (for an output) write and delete there"
_REGION = "set AWS_REGION to the bucket's region"

_REPLIES: dict[str, tuple[type[JobError], str, str]] = {
    "AccessDenied": (DeniedError, "access denied", _GRANT),
    "AllAccessDisabled": (DeniedError, "access denied", _GRANT),
    "AccountProblem": (DeniedError, "the account is refused", "ask the account's owner"),
    "InvalidAccessKeyId": (DeniedError, "the access key id is unknown there", _CHECK_KEYS),
    "SignatureDoesNotMatch": (DeniedError, "the secret does not fit the access key id", _CHECK_KEYS),
    "ExpiredToken": (DeniedError, "the credentials have expired", _RENEW),
    "ExpiredTokenException": (DeniedError, "the credentials have expired", _RENEW),
    "InvalidToken": (DeniedError, "the session token is not valid", _RENEW),
    "TokenRefreshRequired": (DeniedError, "the credentials have expired", _RENEW),
    "InvalidIdentityToken": (DeniedError, "the web identity is refused", "check the role's trust policy"),
    "RequestTimeTooSkewed": (DeniedError, "the request's time is refused", _CLOCK),
    "RequestExpired": (DeniedError, "the request's time is refused", _CLOCK),
    "InvalidObjectState": (DeniedError, "the object is archived", "restore it to a class that can be read at once"),
    "NoSuchBucket": (NotFoundError, "no such bucket", "check the bucket's name and AWS_ENDPOINT_URL_S3"),
    "NoSuchKey": (NotFoundError, "no such object", "check the key"),
    "InvalidBucketName": (ConfigError, "not a possible bucket name", "write s3://bucket/key"),
    "PermanentRedirect": (ConfigError, "the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": (ConfigError, "the region is wrong", _REGION),
    "IllegalLocationConstraintException": (ConfigError, "the region is wrong", _REGION),
    "InvalidRegion": (ConfigError, "the region is wrong", _REGION),
    "NotImplemented": (ConfigError, "the server does not serve this request", "use a server that does"),
    "PreconditionFailed": (UnavailableError, "changed while being read", "start again when nobody writes there"),
}
_LATER = "try again later"
_DAMAGED_HINT = "something on the way changes what is sent; try again later"
_BUSY = {"SlowDown", "RequestTimeout", "RequestTimeoutException", "TooManyRequests", "OperationAborted"}
# What arrived is not what was sent. botocore takes that for the caller's fault, and doesn't send it again.
_DAMAGED_UPLOAD = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_CODE = re.compile(r"[A-Za-z0-9.]{1,60}")


def reply_error(label: str, endpoint: str, code: str, status: int) -> JobError:
    """Return the error for an answer with this code and HTTP status; a HEAD's answer has nothing but the status."""
    shown = code if _CODE.fullmatch(code) else "unnamed"
    suffix = f"({shown}, HTTP {status}, from {endpoint})"
    if code in _REPLIES:
        kind, what, hint = _REPLIES[code]
        return kind(f"{label}: {what} {suffix}", hint=hint)
    if code in _DAMAGED_UPLOAD:
        return UnavailableError(f"{label}: what was sent arrived damaged {suffix}", hint=_DAMAGED_HINT)
    if code in _BUSY or "Throttl" in code or status == 429 or status >= 500:
        return UnavailableError(f"{label}: the server can't answer now {suffix}", hint=_LATER)
    if status in (401, 403):
        return DeniedError(f"{label}: access denied {suffix}", hint=_GRANT)
    if status == 404:
        return NotFoundError(f"{label}: not found {suffix}", hint="check the bucket and the key")
    if status in (301, 307):
        return ConfigError(f"{label}: the bucket is in another region {suffix}", hint=_REGION)
    if status == 412:
        return reply_error(label, endpoint, "PreconditionFailed", status)
    return ConfigError(f"{label}: the server refuses the request {suffix}", hint="check the URI and the endpoint")


def open_client(label: str) -> tuple["S3Client", botocore.session.Session]:
    """Return a client of the default chain's endpoint, credentials and region (us-east-1 if none is set), with the
    session that found them."""
    with s3_errors(label, None), _endpoint_errors(label):
        core = botocore.session.get_session()
        core.register_component("data_loader", _loader())
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
        session = boto3.session.Session(botocore_session=core)
        # Other SDKs read AWS_REGION, and so do people; boto3 reads AWS_DEFAULT_REGION only.
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        # Any: which S3Client type this is depends on the stubs that happen to be installed.
        client: Any = session.client("s3", region_name=region, config=_config("auto"))
        if not _AWS_HOST.fullmatch(urlsplit(client.meta.endpoint_url).hostname or ""):
            # `bucket.host` resolves at few servers that are not AWS; a profile can ask for it all the same.
            style = core.get_scoped_config().get("s3", {}).get("addressing_style", "path")
            client.close()
            client = session.client("s3", region_name=region, config=_config(style))
        client.meta.events.register("needs-retry.s3", _retry_damaged_upload)
        client.meta.events.register_last("before-call.s3", _send_at_once)  # not .PutObject, which comes before
        endpoint_of(client)  # a port that is no number shows here
    return client, core


def _retry_damaged_upload(response: tuple[Any, dict[str, Any]] | None, attempts: int, **_: object) -> float | None:
    """Return after how many seconds to send a request again, for botocore; None where that is not this one's matter."""
    if response is None or attempts >= ATTEMPTS:
        return None
    code = response[1].get("Error", {}).get("Code")
    return retry_delay_s(attempts) if code in _DAMAGED_UPLOAD else None


def _send_at_once(params: dict[str, Any], **_: object) -> None:
    # Whether the server wants a small body is asked in as much time as it is sent in.
    size_bytes = determine_content_length(params["body"]) if "Expect" in params["headers"] else None
    if size_bytes is not None and size_bytes <= _SENT_AT_ONCE_BYTES:
        del params["headers"]["Expect"]


@cache
def _loader() -> Loader:
    # Shared, for a job opens several places, and reading botocore's description of S3 takes longer than a request.
    return create_loader()


def _parse_timestamp(value: Any) -> datetime:
    # By itself, botocore takes most of a long listing's time for the times in it.
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return parse_timestamp(value)


def _config(addressing_style: Any) -> Config:
    return Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=THREADS_FOR_SMALL,
        # Asked for where it applies: a part's answer may carry the whole object's checksum.
        response_checksum_validation="when_required",
        s3={"addressing_style": addressing_style},
    )


def endpoint_of(client: "S3Client") -> str:
    """Return host:port of the server, without what else its URL may hold."""
    url = urlsplit(client.meta.endpoint_url)
    return f"{url.hostname}:{url.port or (443 if url.scheme == 'https' else 80)}"


@contextmanager
def _endpoint_errors(label: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if isinstance(error, boto.InvalidRegionError):
            raise
        shown = re.sub(r"//[^/]*@", "//", str(error).removeprefix("Invalid endpoint: "))
        raise ConfigError(
            f"{label}: AWS_ENDPOINT_URL_S3={shown} is not a URL", hint="write https://host or http://host:port"
        ) from None


def code_and_status(error: boto.ClientError) -> tuple[str, int]:
    """Return the error's code (for a HEAD: its status, as text) and the HTTP status."""
    return error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]


@contextmanager
def s3_errors(label: str, client: "S3Client | None") -> Iterator[None]:
    """Turn what boto3 raises into a JobError; the original, whose text can hold secrets, is not chained."""
    try:
        yield
    except (boto.BotoCoreError, boto.ClientError, S3UploadFailedError, FileNotFoundError) as error:
        raise _job_error(label, endpoint_of(client) if client else "", error) from None


def _job_error(label: str, endpoint: str, error: Exception) -> JobError:
    cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
    if isinstance(cause, boto.ClientError):
        return reply_error(label, endpoint, *code_and_status(cause))
    if isinstance(cause, boto.PartialCredentialsError):
        return DeniedError(f"{label}: incomplete AWS credentials ({cause.kwargs['cred_var']} is missing)", hint=_SET)
    if isinstance(cause, boto.NoCredentialsError):
        return DeniedError(f"{label}: no AWS credentials found", hint=_SET)
    if isinstance(cause, _NO_CREDENTIALS):
        return DeniedError(f"{label}: AWS credentials can't be obtained ({type(cause).__name__})", hint=_SET)
    if isinstance(cause, boto.InvalidRegionError):
        return ConfigError(f"{label}: AWS_REGION is not a region's name", hint="for example us-east-1")
    if isinstance(cause, _BAD_PROFILE):
        return ConfigError(
            f"{label}: the AWS profile can't be read ({type(cause).__name__})",
            hint="check AWS_PROFILE, AWS_CONFIG_FILE",
        )
    if isinstance(cause, boto.ParamValidationError):
        return ConfigError(f"{label}: not a possible bucket name or key", hint="write s3://bucket/key")
    if isinstance(cause, boto.SSLError):
        return UnavailableError(
            f"{label}: no trusted TLS connection to {endpoint}", hint="AWS_CA_BUNDLE names your CAs"
        )
    if isinstance(cause, boto.ConnectionError | boto.HTTPClientError):
        return UnavailableError(
            f"{label}: {endpoint} can't be reached ({type(cause).__name__})",
            hint="check AWS_ENDPOINT_URL_S3 and the network",
        )
    return InternalError(f"{label}: unforeseen answer from {endpoint} ({type(cause).__name__})")
