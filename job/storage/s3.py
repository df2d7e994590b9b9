"""Files in S3, or in any server that speaks its protocol: this module and s3_client.py import boto3.

The endpoint and the credentials are those of the AWS default chain. Objects come in parts or ranges over several
threads, each request pinned to the ETag that was listed, and the result is verified against that ETag.
"""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from job.errors import ConfigError, NotFoundError, UnavailableError
from job.storage import PROBE_NAME, Progress, StoredFile, digest_rows
from job.storage.paths import check_path, compile_pattern, is_pattern, literal_prefix, pattern_folder
from job.storage.s3_client import code_and_status, endpoint_of, open_client, reply_error, s3_errors
from job.storage.transfer import (
    PIECE_BYTES,
    SEGMENT_BYTES,
    THREADS,
    TRIES,
    BrokenTransferError,
    RestartTransferError,
    Segment,
    Task,
    download,
    retry_delay_s,
    run_tasks,
)

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

_BROKEN_BODY = (
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    HTTPError,
    OSError,
)
_NO_PARTS = {"InvalidPart", "InvalidPartNumber", "InvalidArgument", "NotImplemented"}
_UPLOAD = TransferConfig(multipart_threshold=SEGMENT_BYTES, multipart_chunksize=SEGMENT_BYTES, max_concurrency=THREADS)
_MD5_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d{1,5}))?")


class S3Store:
    """`s3://bucket/key`, `s3://bucket/prefix/`, or a glob; as a slot, the folder `prefix/`."""

    def __init__(self, uri: str, *, setting: str) -> None:
        bucket, _, self.key = uri.removeprefix("s3://").partition("/")
        if "@" in bucket or ":" in bucket:  # not shown: people write keys there
            raise ConfigError(
                f"{setting}: an s3:// URI starts with the bucket's name alone",
                hint="write s3://bucket/key; credentials go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        if not bucket:
            raise ConfigError(f"{setting}={uri}: names no bucket", hint="write s3://bucket/key")
        self.uri = uri
        self.bucket = bucket
        self.label = f"{setting}={uri}"
        self.client = open_client(self.label)

    def find(self) -> list[StoredFile]:
        """List the object with this key, or else what the glob matches, or everything under the key as a folder."""
        head_status = 404
        if self.key and not self.key.endswith("/"):
            found, head_status = self._head()
            if found is not None:
                return [found]
        if is_pattern(self.key):
            return self._match()
        folder = self._folder()
        files = sorted(self._list(folder, folder), key=lambda file: file.path)
        if not files and head_status != 404:
            raise reply_error(self.label, endpoint_of(self.client), str(head_status), head_status)
        if not files:
            raise NotFoundError(f"{self.label}: nothing is there", hint=self._describe_neighbours())
        return files

    def fetch(self, files: list[StoredFile], folder: Path, progress: Progress) -> list[Path]:
        """Download the files into the folder, each verified against the ETag that `find` saw."""
        targets = [folder / check_path(file.path, self.label_of(file.uri)) for file in files]
        download([(_S3Object(self, file), target) for file, target in zip(files, targets, strict=True)], progress)
        return targets

    def revision(self, files: list[StoredFile]) -> str:
        """Return a sha256 over the paths, sizes and ETags."""
        return digest_rows([(file.path, str(file.size_bytes), file.etag) for file in files])

    def put(self, source: Path, path: str) -> None:
        """Upload a file with SHA-256 checksums for the server to verify; one above 16 MiB in parts."""
        source.stat()  # a missing source is the caller's fault, not the store's
        key = self._slot_key(path)

        def upload() -> list[Task]:
            with s3_errors(self.label_of(self._uri(key)), self.client):
                self.client.upload_file(
                    str(source), self.bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=_UPLOAD
                )
            return []

        # On another thread, for boto3 lets no signal end an upload before its requests have timed out: 80 s.
        run_tasks([upload], threading.Event())

    def read(self, path: str) -> bytes | None:
        """Return an object of the slot, or None where there is none."""
        uri = self._uri(self._slot_key(path))
        for tries in range(1, TRIES + 1):
            try:
                pieces = _S3Object(self, StoredFile(uri, path, 0, "")).stream(Segment(0))
                return b"".join(piece for _, piece in pieces)
            except _NoSuchKeyError:
                return None
            except BrokenTransferError as error:
                reason = str(error)
                time.sleep(retry_delay_s(tries))
        raise UnavailableError(f"{self.label_of(uri)}: {reason}, {TRIES} times over", hint="try again later")

    def delete(self, path: str) -> None:
        """Delete an object of the slot."""
        key = self._slot_key(path)
        with s3_errors(self.label_of(self._uri(key)), self.client):
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def check_writable(self) -> None:
        """Put an empty object into the slot and delete it."""
        key = self._slot_key(PROBE_NAME)
        with s3_errors(self.label_of(self._uri(key)), self.client):
            self.client.put_object(Bucket=self.bucket, Key=key, Body=b"", ChecksumAlgorithm="SHA256")
        self.delete(PROBE_NAME)

    def label_of(self, uri: str) -> str:
        """Return how messages name one object of this place."""
        return self.label if uri == self.uri else f"{self.label}: {uri}"

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def _folder(self) -> str:
        return self.key if self.key in ("", "/") or self.key.endswith("/") else self.key + "/"

    def _slot_key(self, path: str) -> str:
        return self._folder() + check_path(path, self.label)

    def _head(self) -> tuple[StoredFile | None, int]:
        with s3_errors(self.label, self.client):
            try:
                head = self.client.head_object(Bucket=self.bucket, Key=self.key)
            except boto.ClientError as error:
                _, status = code_and_status(error)
                if status >= 500:
                    raise
                return None, status  # a HEAD carries no reason; the listing that follows does
        name = self.key.rsplit("/", 1)[-1]
        return StoredFile(self.uri, name, head["ContentLength"], head["ETag"].strip('"')), 200

    def _list(self, prefix: str, folder: str) -> Iterator[StoredFile]:
        with s3_errors(self.label, self.client):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    key, size_bytes = item["Key"], item["Size"]
                    if size_bytes == 0 and key.endswith("/"):
                        continue  # a folder marker, made by consoles
                    yield StoredFile(self._uri(key), key.removeprefix(folder), size_bytes, item["ETag"].strip('"'))

    def _match(self) -> list[StoredFile]:
        prefix, folder = literal_prefix(self.key), pattern_folder(self.key)
        pattern = compile_pattern(self.key.removeprefix(folder))
        listed = list(self._list(prefix, folder))
        files = sorted((file for file in listed if pattern.fullmatch(file.path)), key=lambda file: file.path)
        if not files:
            raise NotFoundError(
                f"{self.label}: the glob matches nothing; {len(listed)} objects are under {self._uri(prefix)}",
                hint="'*' stays within one folder, '**' crosses folders",
            )
        return files

    def _describe_neighbours(self) -> str:
        start = self.key.rstrip("/")
        with s3_errors(self.label, self.client):
            page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=start, MaxKeys=3)
        keys = [self._uri(item["Key"]) for item in page.get("Contents", [])]
        return f"what is there begins with {', '.join(keys)}" if keys else f"no key starts with {start!r}; check it"


class _NoSuchKeyError(NotFoundError):
    """The one absence that `read` answers with None."""


class _S3Object:
    """One object to download: cut into its own parts, whose MD5s make up its ETag, or into ranges."""

    def __init__(self, store: S3Store, file: StoredFile) -> None:
        self.label = store.label_of(file.uri)
        self.size_bytes = file.size_bytes
        self._client = store.client
        self._etag = file.etag
        self._address = {"Bucket": store.bucket, "Key": file.uri.removeprefix(f"s3://{store.bucket}/")}
        match = _MD5_ETAG.fullmatch(file.etag)
        # Directory buckets (S3 Express) have ETags that look like MD5s and are not.
        self._etag_is_md5 = match is not None and not store.bucket.endswith("--x-s3")
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
        with s3_errors(self.label, self._client):
            response = self._get(segment)
        md5 = hashlib.md5(usedforsecurity=False)
        with closing(response["Body"]) as body:
            offset = self._check_answer(segment, response)
            while True:
                try:
                    piece = body.read(PIECE_BYTES)
                except boto.FlexibleChecksumError as error:
                    raise BrokenTransferError("arrived damaged: not what its stored checksum says") from error
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
            raise BrokenTransferError("arrived damaged: its MD5 is not the ETag's")

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
        except boto.ClientError as error:
            code, _ = code_and_status(error)
            if segment.part_number and code in _NO_PARTS:
                self._by_parts = False
                raise RestartTransferError from None
            if code == "NoSuchKey" and self._etag:
                raise UnavailableError(f"{self.label}: removed while being read", hint="start again") from None
            if code == "NoSuchKey":
                raise _NoSuchKeyError(f"{self.label}: no such object") from None
            raise

    def _check_answer(self, segment: Segment, response: "GetObjectOutputTypeDef") -> int:
        """Return the offset at which the answer starts."""
        if self._etag and response["ETag"].strip('"') != self._etag:
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
