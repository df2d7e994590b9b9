"""One S3 object on its way here: in parts or ranges, each request pinned to the ETag that was listed, and the result
verified against it."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from job.errors import NotFoundError, UnavailableError
from job.storage import StoredFile
from job.storage.s3_client import code_and_status, endpoint_of, reply_error, s3_errors
from job.storage.transfer import (
    PIECE_BYTES,
    SEGMENT_BYTES,
    SMALL_BYTES,
    BrokenTransferError,
    DamagedTransferError,
    RestartTransferError,
    Segment,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

    from job.storage.s3_quick import QuickReader

_BROKEN_BODY = (
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    HTTPError,
    OSError,
)
_NO_PARTS = {"InvalidPart", "InvalidPartNumber", "InvalidArgument", "NotImplemented"}
_MD5_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d{1,5}))?")


class NoSuchKeyError(NotFoundError):
    """The one absence that a store's `read` answers with None."""


class S3Object:
    """One object to download: cut into its own parts, whose MD5s make up its ETag, or into ranges.

    Without an ETag in `file`, whatever version is there is meant; `found_etag` is that of the last answer.
    """

    def __init__(
        self, client: "S3Client", bucket: str, file: StoredFile, *, label: str, quick: "QuickReader | None" = None
    ) -> None:
        self.label = label
        self.size_bytes = file.size_bytes
        self.found_etag = ""
        self._client = client
        self._quick = quick
        self._etag = file.etag
        self._address = {"Bucket": bucket, "Key": file.uri.removeprefix(f"s3://{bucket}/")}
        match = _MD5_ETAG.fullmatch(file.etag)
        # Directory buckets (S3 Express) have ETags that look like MD5s and are not.
        self._etag_is_md5 = match is not None and not bucket.endswith("--x-s3")
        self._part_count = int(match[2]) if match and match[2] else 0
        self._by_parts = self._part_count > 0
        self._md5s: dict[int, bytes] = {}

    def segments(self) -> list[Segment]:
        """Cut by parts where the ETag counts some, else into ranges of 16 MiB; a small object is whole."""
        if self._by_parts:
            return [Segment(index, part_number=index + 1) for index in range(self._part_count)]
        if self.size_bytes <= SEGMENT_BYTES:
            return [Segment(0)]
        starts = range(0, self.size_bytes, SEGMENT_BYTES)
        return [Segment(i, start, min(SEGMENT_BYTES, self.size_bytes - start)) for i, start in enumerate(starts)]

    def stream(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a segment, and remember its MD5."""
        if (content := self._read_quickly()) is not None:
            self._md5s[segment.index] = bytes.fromhex(self._etag)
            yield 0, content
            return
        with s3_errors(self.label, self._client):
            response = self._get(segment)
        md5 = hashlib.md5(usedforsecurity=False)
        with closing(response["Body"]) as body:
            offset = self._check_answer(segment, response)
            while True:
                try:
                    piece = body.read(PIECE_BYTES)
                except boto.FlexibleChecksumError as error:
                    raise DamagedTransferError("arrived damaged: not what its stored checksum says") from error
                except _BROKEN_BODY as error:
                    raise BrokenTransferError(f"the transfer broke off ({type(error).__name__})") from error
                if not piece:
                    break
                md5.update(piece)
                yield offset, piece
                offset += len(piece)
        self._md5s[segment.index] = md5.digest()

    def verify(self, path: Path) -> None:
        """Compare with the ETag, where it is an MD5 (of the MD5s of the parts)."""
        if not self._etag_is_md5 or (self._part_count and not self._by_parts):
            return
        if self._part_count:
            md5s = b"".join(self._md5s[index] for index in range(self._part_count))
            etag = f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{self._part_count}"
        elif self.size_bytes <= SEGMENT_BYTES:
            etag = self._md5s[0].hex()
        else:
            with path.open("rb") as stream:
                etag = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if etag != self._etag:
            raise DamagedTransferError("arrived damaged: its MD5 is not the ETag's")

    def _read_quickly(self) -> bytes | None:
        """Return a small object that can be verified by its ETag; None where it must be read in the usual way."""
        if self._quick is None or self._part_count or not self._etag_is_md5 or self.size_bytes > SMALL_BYTES:
            return None
        quick, self._quick = self._quick, None  # tried once
        return quick.read(self._address["Key"], self._etag)

    def _get(self, segment: Segment) -> "GetObjectOutputTypeDef":
        request: dict[str, Any] = dict(self._address)
        if self._etag:
            request["IfMatch"] = f'"{self._etag}"'
        if segment.part_number:
            request["PartNumber"] = segment.part_number
        elif segment.size_bytes:
            request["Range"] = f"bytes={segment.start}-{segment.start + segment.size_bytes - 1}"
        else:
            request["ChecksumMode"] = "ENABLED"  # botocore then verifies a stored checksum, if it knows the algorithm
        try:
            return self._client.get_object(**request)
        except HTTPError as error:  # a refusal that breaks off, which botocore reads outside of its own handling
            raise BrokenTransferError(f"the transfer broke off ({type(error).__name__})") from None
        except boto.ClientError as error:
            code, status = code_and_status(error)
            if code == str(status) == "404":
                # A GET's refusal says what is missing; this one broke off before it did.
                raise BrokenTransferError(f"an answer came without its reason (HTTP {status})") from None
            if segment.part_number and code in _NO_PARTS:
                self._by_parts = False
                raise RestartTransferError from None
            if code == "NoSuchKey" and self._etag:
                raise UnavailableError(f"{self.label}: removed while being read", hint="start again") from None
            if code == "NoSuchKey":
                raise NoSuchKeyError(f"{self.label}: no such object") from None
            raise

    def _check_answer(self, segment: Segment, response: "GetObjectOutputTypeDef") -> int:
        """Return the offset at which the answer starts."""
        self.found_etag = response["ETag"].strip('"')
        if self._etag and self.found_etag != self._etag:
            raise reply_error(self.label, endpoint_of(self._client), "PreconditionFailed", 200)
        encryption = response.get("ServerSideEncryption", "")
        if encryption.startswith("aws:kms") or response.get("SSECustomerAlgorithm"):
            self._etag_is_md5 = False
        if segment.part_number and self._part_count > 1 and response.get("PartsCount") != self._part_count:
            # A server that ignores PartNumber. Where its parts begin can't be known, so the ETag can't be checked.
            self._by_parts = False
            raise RestartTransferError
        match = re.match(r"bytes (\d+)-", response.get("ContentRange", "bytes 0-"))
        start = int(match[1]) if match else 0
        if segment.size_bytes and start != segment.start:
            raise BrokenTransferError(f"bytes from {start} came instead of those from {segment.start}")
        return start
