"""Many small objects by obstore, compiled code, where botocore would take longer over each than the network does."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from botocore.session import Session
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from job.storage.s3_client import CONNECT_TIMEOUT_S, READ_TIMEOUT_S

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential
    from types_boto3_s3 import S3Client

_T = TypeVar("_T")
_NOT_THIS_ONE = (FileNotFoundError, PreconditionError, ValueError)  # the others may still be moved


class QuickBucket:
    """Reads and writes whole objects of a bucket. What it can't, the client is to try, and to say why not.

    It tries nothing twice, and after a refusal, a broken connection or damage nothing at all.
    """

    def __init__(self, client: "S3Client", session: Session, bucket: str) -> None:
        """Go where the client does, with the credentials that the session has now.

        Raises what botocore does where it can't get them, or doesn't know the bucket's address.
        """
        self._store: S3Store | None = None
        credentials = session.get_credentials()
        if credentials is None:
            return
        found = credentials.get_frozen_credentials()
        url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "-"}).partition("?")[0]
        credential: S3Credential = {
            "access_key_id": found.access_key or "",
            "secret_access_key": found.secret_key or "",
            "token": found.token,
            "expires_at": None,
        }
        with suppress(BaseError, OSError, ValueError):  # the client's error, if it has one, names the setting
            self._store = S3Store(
                bucket,
                # What is given here overrides what obstore reads from the environment by itself. "Virtual hosted": the
                # URL is the bucket's, wherever in it the name stands.
                aws_endpoint_url_s3=url.removesuffix("/-"),
                virtual_hosted_style_request=True,
                region=client.meta.region_name,
                credential_provider=lambda: credential,
                skip_signature=False,
                checksum_algorithm="SHA256",
                client_options=_client_options(session, url),
                retry_config={"max_retries": 0},
            )

    def read(self, key: str, md5: bytes) -> bytes | None:
        """Return the object whose ETag this MD5 is, verified; None where that didn't succeed, for whatever reason."""
        options: obstore.GetOptions = {"if_match": f'"{md5.hex()}"'}
        content = self._try(key, lambda store: obstore.get(store, key, options=options).bytes().to_bytes())
        if content is None or hashlib.md5(content, usedforsecurity=False).digest() == md5:
            return content
        self._store = None  # all may be so: of encrypted objects the ETag is no MD5
        return None

    def write(self, key: str, content: bytes) -> bool:
        """Write an object, with its SHA-256 for the server to verify; False where that may not have succeeded."""
        return self._try(key, lambda store: obstore.put(store, key, content, use_multipart=False)) is not None

    def _try(self, key: str, act: Callable[[S3Store], _T]) -> _T | None:
        store = self._store
        if store is None or key.strip("/") != key:  # which obstore takes away
            return None
        try:
            return act(store)
        except _NOT_THIS_ONE:
            return None
        except (BaseError, OSError):
            self._store = None
            return None


def _client_options(session: Session, url: str) -> "ClientConfig":
    options: ClientConfig = {
        "allow_http": url.startswith("http:"),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=READ_TIMEOUT_S),
    }
    bundle = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    if path := bundle or os.environ.get("CURL_CA_BUNDLE"):
        options["root_certificate"] = Path(path).read_bytes()
    return options
