"""Files in S3, or in any server that speaks its protocol: this module, s3_client.py, s3_object.py and s3_quick.py
import boto3, botocore or obstore.

The endpoint and the credentials are those of the AWS default chain.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto

from job.errors import ConfigError, NotFoundError, UnavailableError
from job.log import logger
from job.storage import PROBE_NAME, Arrived, Progress, StoredFile, digest_rows
from job.storage.paths import check_path, compile_pattern, is_pattern, literal_prefix, pattern_folder
from job.storage.s3_client import code_and_status, endpoint_of, open_client, reply_error, s3_errors
from job.storage.s3_object import NoSuchKeyError, S3Object
from job.storage.transfer import (
    SEGMENT_BYTES,
    SMALL_BYTES,
    THREADS,
    THREADS_FOR_SMALL,
    TRIES,
    BrokenTransferError,
    Segment,
    Task,
    download,
    retry_delay_s,
    run_tasks,
)

if TYPE_CHECKING:
    from job.storage.s3_quick import QuickBucket

_MANY = 16  # small objects: from here on obstore saves more time than its import takes
_UPLOAD = TransferConfig(multipart_threshold=SEGMENT_BYTES, multipart_chunksize=SEGMENT_BYTES, max_concurrency=THREADS)


class S3Store:
    """`s3://bucket/key`, `s3://bucket/prefix/`, or a glob; as a slot, the folder `prefix/`."""

    takes_commits: Literal[False] = False

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
        self.client, self.session = open_client(self.label)
        self._has_conditions = True

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

    def fetch(
        self, files: list[StoredFile], folder: Path, progress: Progress, arrived: Arrived | None = None
    ) -> list[Path]:
        """Download the files into the folder, each in the version that `find` saw, and verified."""
        targets = [folder / check_path(file.path, self.label_of(file.uri)) for file in files]
        quick = self._open_quick(file.size_bytes for file in files)
        objects = [self._object(file, quick) for file in files]
        by_target = dict(zip(targets, files, strict=True))
        tell = None if arrived is None else lambda target: arrived(by_target[target], target)
        download(list(zip(objects, targets, strict=True)), progress, tell)
        return targets

    def revision(self, files: list[StoredFile]) -> str:
        """Return a sha256 over the paths, sizes and ETags."""
        return digest_rows([(file.path, str(file.size_bytes), file.etag) for file in files])

    def put(self, source: Path, path: str) -> None:
        """Upload a file with SHA-256 checksums for the server to verify; one above 16 MiB in parts."""
        self.put_all([(source, path)])

    def put_all(self, files: Sequence[tuple[Path, str]]) -> None:
        """Upload files so: those below 1 MiB many at a time, and then one larger one after the other."""
        small: list[Task] = []
        large: list[Task] = []
        sizes = [source.stat().st_size for source, _ in files]  # a missing source is no fault of the store
        quick = self._open_quick(sizes)
        for (source, path), size_bytes in zip(files, sizes, strict=True):
            key = self._slot_key(path)
            if size_bytes < SMALL_BYTES:
                small.append(partial(self._upload_small, source, key, quick))
            else:
                large.append(partial(self._upload_large, source, key))
        # On other threads, for boto3 lets no signal end an upload before its requests have timed out: 80 s.
        run_tasks(small, threading.Event(), THREADS_FOR_SMALL)
        for task in large:
            run_tasks([task], threading.Event())

    def _upload_small(self, source: Path, key: str, quick: "QuickBucket | None") -> list[Task]:
        content = source.read_bytes()
        if quick is None or not quick.write(key, content):
            with s3_errors(self.label_of(self._uri(key)), self.client):
                self._put_small(key, content, {})  # upload_file takes far more CPU time for it
        return []

    def _upload_large(self, source: Path, key: str) -> list[Task]:
        with s3_errors(self.label_of(self._uri(key)), self.client):
            extra = {"ChecksumAlgorithm": "SHA256"}
            self.client.upload_file(str(source), self.bucket, key, ExtraArgs=extra, Config=_UPLOAD)
        return []

    def _open_quick(self, sizes_bytes: Iterable[int]) -> "QuickBucket | None":
        """Return the quick way for many small objects; None where there are few."""
        if sum(size_bytes < SMALL_BYTES for size_bytes in sizes_bytes) < _MANY:
            return None
        from job.storage.s3_quick import QuickBucket

        with s3_errors(self.label, self.client):
            return QuickBucket(self.client, self.session, self.bucket)

    def read(self, path: str) -> bytes | None:
        """Return an object of the slot, or None where there is none."""
        found = self.read_version(path)
        return None if found is None else found[0]

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        """Return an object of the slot with its ETag."""
        uri = self._uri(self._slot_key(path))
        wanted = self._object(StoredFile(uri, path, 0, ""))
        for tries in range(1, TRIES + 1):
            try:
                content = b"".join(piece for _, piece in wanted.stream(Segment(0)))
            except NoSuchKeyError:
                return None
            except BrokenTransferError as error:
                reason = str(error)
                time.sleep(retry_delay_s(tries))
            else:
                return content, wanted.found_etag
        raise UnavailableError(f"{wanted.label}: {reason}, {TRIES} times over", hint="try again later")

    def swap(self, path: str, content: bytes, version: str | None) -> str | None:
        """Put an object with If-Match or, for one that is new, If-None-Match.

        A server that doesn't know them is warned of once, and overwrites.
        """
        key = self._slot_key(path)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
        with s3_errors(self.label_of(self._uri(key)), self.client):
            try:
                return self._put_small(key, content, condition if self._has_conditions else {})
            except boto.ClientError as error:
                code, status = code_and_status(error)
                if code == "NotImplemented":
                    self._has_conditions = False
                    logger.warning(
                        "%s knows no conditional writes: two jobs on %s can't be kept apart there",
                        endpoint_of(self.client),
                        self.uri,
                    )
                    return self._put_small(key, content, {})
                # 409: written just now by another; 404: If-Match on an object that is gone
                if status not in (404, 409, 412) or code == "NoSuchBucket":
                    raise
        # A request whose answer was lost is sent again, and then meets what it wrote itself.
        found = self.read_version(path)
        return found[1] if found is not None and found[0] == content else None

    def _put_small(self, key: str, content: bytes, condition: dict[str, Any]) -> str:
        answer = self.client.put_object(
            Bucket=self.bucket, Key=key, Body=content, ChecksumAlgorithm="SHA256", **condition
        )
        return answer["ETag"].strip('"')

    def delete(self, path: str) -> None:
        """Delete an object of the slot."""
        key = self._slot_key(path)
        with s3_errors(self.label_of(self._uri(key)), self.client):
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def check_writable(self) -> None:
        """Put an empty object into the slot and delete it."""
        key = self._slot_key(PROBE_NAME)
        with s3_errors(self.label_of(self._uri(key)), self.client):
            self._put_small(key, b"", {})
        self.delete(PROBE_NAME)

    def label_of(self, uri: str) -> str:
        """Return how messages name one object of this place."""
        return self.label if uri == self.uri else f"{self.label}: {uri}"

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def _object(self, file: StoredFile, quick: "QuickBucket | None" = None) -> S3Object:
        return S3Object(self.client, self.bucket, file, label=self.label_of(file.uri), quick=quick)

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
