"""Small objects past most of botocore's layers, the CPU time of which is what thousands of them would wait for."""

import hashlib
import os
from typing import TYPE_CHECKING
from urllib.parse import quote

from botocore import exceptions as boto
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from botocore.session import Session
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from job.storage.s3_client import CONNECT_TIMEOUT_S, READ_TIMEOUT_S
from job.storage.transfer import THREADS_FOR_SMALL

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_NOT_THIS_OBJECT = (404, 412)  # the others may still be had
_FAILURES = (boto.BotoCoreError, boto.ClientError, HTTPError, OSError)


class QuickReader:
    """Reads whole objects of a bucket. What it can't read, the client is to try, and to say why not."""

    def __init__(self, client: "S3Client", session: Session, bucket: str) -> None:
        """Read from where the client does, with its credentials, which are those of the session."""
        self._credentials = session.get_credentials()
        self._region = client.meta.region_name
        presigned_url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "-"})
        self._folder_url = presigned_url.partition("?")[0].removesuffix("-")
        bundle = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        # The stubs know of less than it takes: a file of CAs, and two timeouts.
        self._http = URLLib3Session(
            verify=bundle or os.environ.get("CURL_CA_BUNDLE") or True,  # type: ignore[arg-type]
            proxies=get_environ_proxies(client.meta.endpoint_url),
            timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),  # type: ignore[arg-type]
            max_pool_connections=THREADS_FOR_SMALL,
        )
        self._is_refused = False

    def read(self, key: str, md5: str) -> bytes | None:
        """Return the object whose ETag this MD5 is, verified; None where that didn't succeed, for whatever reason."""
        if self._credentials is None or self._is_refused:
            return None
        request = AWSRequest("GET", self._folder_url + quote(key), headers={"If-Match": f'"{md5}"'})
        try:
            signer = S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self._region)
            signer.add_auth(request)
            response = self._http.send(request.prepare())
        except _FAILURES:
            return None
        content: bytes = response.content
        status = response.status_code
        if 300 <= status < 500 and status not in _NOT_THIS_OBJECT:
            self._is_refused = True
        is_whole = status == 200 and hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        return content if is_whole else None
