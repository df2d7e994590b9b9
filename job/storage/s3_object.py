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
from job.storage.s3_checksum import PartHashes, parse_etag, parse_stored
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

    from job.storage.s3_quick import QuickBucket

_BROKEN_BODY = (
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    HTTPError,
    OSError,
)
_REQUESTS = 32  # for one object; for small parts, as boto3 makes them, each costs more than what it brings
_JOINED_BYTES = 64 * 2**20
_NO_PARTS = {"InvalidPart", "InvalidPartNumber", "InvalidArgument", "NotImplemented"}


class NoSuchKeyError(NotFoundError):
    """The one absence that a store's `read` answers with None."""


class S3Object:
    """One object to download: cut into its own parts, whose checksums make up the object's, or into ranges.

    Without an ETag in `file`, whatever version is there is meant; `found_etag` is that of the last answer.
    """

    def __init__(
        self, client: "S3Client", bucket: str, file: StoredFile, *, label: str, quick: "QuickBucket | None" = None
    ) -> None:
        self.label = label
        self.size_bytes = file.size_bytes
        self.found_etag = ""
        self._client = client
        self._quick = quick
        self._etag = file.etag
        self._address: dict[str, Any] = {"Bucket": bucket, "Key": file.uri.removeprefix(f"s3://{bucket}/")}
        self._checksum = parse_etag(file.etag)
        self._part_count = self._checksum.part_count if self._checksum else 0
        self._by_parts = self._part_count > 0
        self._part_bytes: int | None = None  # of every part but the last, where that is known
        self._may_join = True
        self._digests: dict[int, bytes] = {}
        if bucket.endswith("--x-s3"):  # ETags in directory buckets (S3 Express) look like MD5s and are not
            self._checksum = None

    def segments(self) -> list[Segment]:
        """Cut by parts where the ETag counts some, else into ranges of 16 MiB; a small object is whole.

        For parts it asks whether the store has their checksum, too. Raises UnavailableError where it is out of reach.
        """
        if self._by_parts:
            self._look_at_parts()
            if self._part_bytes:
                step_bytes = self._part_bytes * self._joined_parts(self._part_bytes)
                starts = range(0, self.size_bytes, step_bytes)
                return [self._range(start // self._part_bytes, start, step_bytes) for start in starts]
            return [Segment(index, part_number=index + 1) for index in range(self._part_count)]
        if self.size_bytes <= SEGMENT_BYTES:
            return [Segment(0)]
        starts = range(0, self.size_bytes, SEGMENT_BYTES)
        return [self._range(index, start, SEGMENT_BYTES) for index, start in enumerate(starts)]

    def stream(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a segment, and remember its checksum."""
        if (content := self._read_quickly()) is not None:
            yield 0, content
            return
        with s3_errors(self.label, self._client):
            response = self._get(segment)
        checksum = self._checksum
        hashes = PartHashes(checksum.new, self._part_bytes) if checksum and self._is_hashed_by_segments() else None
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
                if hashes:
                    hashes.update(piece)
                yield offset, piece
                offset += len(piece)
        if hashes:
            self._digests.update(enumerate(hashes.digests(), segment.index))

    def verify(self, path: Path) -> None:
        """Compare with the checksum of the parts' checksums that is stored, else with the ETag where it is an MD5."""
        checksum = self._checksum
        if checksum is None or (self._part_count and not self._by_parts):
            return
        if self._part_count:
            found = checksum.of_parts([self._digests[index] for index in range(self._part_count)])
        elif self._is_hashed_by_segments():
            found = self._digests[0]
        else:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).digest()
        if found != checksum.expected:
            self._may_join = False  # should the parts be of several sizes, the next try learns where each begins
            raise DamagedTransferError(f"arrived damaged: its {checksum.name} is not the one that is stored")

    def _is_hashed_by_segments(self) -> bool:
        return self._by_parts or self.size_bytes <= SEGMENT_BYTES

    def _range(self, index: int, start: int, size_bytes: int) -> Segment:
        return Segment(index, start, min(size_bytes, self.size_bytes - start))

    def _look_at_parts(self) -> None:
        """Find the checksum that is stored, which takes less time to compare than MD5, and how large many parts are."""
        head = self._head(ChecksumMode="ENABLED")
        self._checksum = parse_stored(head, self._part_count) or self._checksum
        self._part_bytes = None
        if self._may_join and self._part_count > _REQUESTS:
            head = self._head(PartNumber=1)
            part_bytes = head["ContentLength"] if head.get("PartsCount") == self._part_count else 0
            if part_bytes and -(-self.size_bytes // part_bytes) == self._part_count:
                self._part_bytes = part_bytes

    def _joined_parts(self, part_bytes: int) -> int:
        """Return how many parts one request asks for, so that enough requests are left to share."""
        return max(1, min(_JOINED_BYTES // part_bytes, -(-self._part_count // _REQUESTS)))

    def _head(self, **options: Any) -> dict[str, Any]:
        """Return what a HEAD says of this version; nothing where it is refused: the GET's refusal gives the reason."""
        with s3_errors(self.label, self._client):
            try:
                head = self._client.head_object(**self._address, **options)
            except boto.ClientError:
                return {}
        return dict(head) if head["ETag"].strip('"') == self._etag else {}

    def _read_quickly(self) -> bytes | None:
        """Return a small object that was verified by its ETag; None where it must be read in the usual way."""
        quick, self._quick = self._quick, None  # tried once
        if quick is None or self._checksum is None or self._part_count or self.size_bytes > SMALL_BYTES:
            return None
        content = quick.read(self._address["Key"], self._checksum.expected)
        if content is not None:
            self._digests[0] = self._checksum.expected
        return content

    def _get(self, segment: Segment) -> "GetObjectOutputTypeDef":
        request = dict(self._address)
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
        is_encrypted = encryption.startswith("aws:kms") or response.get("SSECustomerAlgorithm")
        if is_encrypted and self._checksum and self._checksum.name == "MD5":
            self._checksum = None  # then the ETag only looks like one
        if segment.part_number and self._part_count > 1 and response.get("PartsCount") != self._part_count:
            # A server that ignores PartNumber. Where its parts begin can't be known, so the ETag can't be checked.
            self._by_parts = False
            raise RestartTransferError
        match = re.match(r"bytes (\d+)-", response.get("ContentRange", "bytes 0-"))
        start = int(match[1]) if match else 0
        if segment.size_bytes and start != segment.start:
            raise BrokenTransferError(f"bytes from {start} came instead of those from {segment.start}")
        return start
