"""S3 against a real server: what is found, that bytes come back exact, and which error each trouble becomes."""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3.session
import pytest
import trustme
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from seaweed import READ_ONLY_BUCKET, SeaweedFS

from job.errors import (
    ConfigError,
    DataError,
    DeniedError,
    JobError,
    NotFoundError,
    PreemptedError,
    UnavailableError,
)
from job.storage import PROBE_NAME, StoredFile, open_store
from job.storage.s3 import S3Store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

SETTING = "SFT_DATA__URI"
MIB = 2**20


class Count:
    """Adds up what is reported."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, size_bytes: int) -> None:
        with self._lock:
            self.size_bytes += size_bytes
            self.calls += 1


@pytest.fixture
def put(s3_client: "S3Client", bucket: str) -> Callable[[str, bytes], None]:
    def put_object(key: str, body: bytes) -> None:
        s3_client.put_object(Bucket=bucket, Key=key, Body=body)

    return put_object


def store(uri: str) -> S3Store:
    opened = open_store(uri, setting=SETTING)
    assert isinstance(opened, S3Store)
    return opened


def names(uri: str) -> list[str]:
    return [file.path for file in store(uri).find()]


def left_over(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".sft-part-*")]


def race(bucket: str, path: str, *, writers: int) -> int:
    """Let so many writers replace the version that all of them have read; return how many were told that they did."""
    opened = store(f"s3://{bucket}")
    found = opened.read_version(path)
    start = threading.Barrier(writers)

    def write(_: int) -> tuple[bytes, str | None]:
        content = os.urandom(8)
        start.wait()
        return content, opened.swap(path, content, None if found is None else found[1])

    with ThreadPoolExecutor(writers) as pool:
        written = [(content, version) for content, version in pool.map(write, range(writers)) if version]
    assert opened.read_version(path) in written
    return len(written)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.usefixtures("s3_environment")
class TestFind:
    def test_one_object(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        put("data/train.jsonl", b"rows")
        (file,) = store(f"s3://{bucket}/data/train.jsonl").find()
        assert (file.path, file.size_bytes) == ("train.jsonl", 4)
        assert file.uri == f"s3://{bucket}/data/train.jsonl"
        assert file.etag == hashlib.md5(b"rows").hexdigest()

    def test_prefix_is_a_folder(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        for key in ("data/a.jsonl", "data/sub/b.jsonl", "data-old/c.jsonl"):
            put(key, b"x")
        put("data/", b"")  # a marker
        put("data/empty.jsonl", b"")  # no marker
        assert names(f"s3://{bucket}/data") == ["a.jsonl", "empty.jsonl", "sub/b.jsonl"]
        assert names(f"s3://{bucket}/data/") == ["a.jsonl", "empty.jsonl", "sub/b.jsonl"]
        assert len(names(f"s3://{bucket}")) == 4

    def test_an_object_wins_over_the_folder_of_its_name(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        put("data", b"x")
        put("data/a", b"x")
        assert names(f"s3://{bucket}/data") == ["data"]
        assert names(f"s3://{bucket}/data/") == ["a"]

    @pytest.mark.parametrize(
        ("glob", "expected"),
        [
            ("d/*.jsonl", ["a.jsonl", "b.jsonl"]),
            ("d/?.jsonl", ["a.jsonl", "b.jsonl"]),
            ("d/[!a].jsonl", ["b.jsonl"]),
            ("d/[ac]*", ["a.jsonl", "c.txt"]),
            ("d/**/*.jsonl", ["a.jsonl", "b.jsonl", "s/e.jsonl", "s/t/f.jsonl"]),
            ("d/*/*.jsonl", ["s/e.jsonl"]),
            ("d/**", ["a.jsonl", "b.jsonl", "c.txt", "s/e.jsonl", "s/t/f.jsonl"]),
            ("*/a.jsonl", ["d/a.jsonl"]),
        ],
    )
    def test_globs(self, bucket: str, put: Callable[[str, bytes], None], glob: str, expected: list[str]) -> None:
        for key in ("d/a.jsonl", "d/b.jsonl", "d/c.txt", "d/s/e.jsonl", "d/s/t/f.jsonl"):
            put(key, b"x")
        assert names(f"s3://{bucket}/{glob}") == expected

    def test_more_than_a_page(self, bucket: str, put: Callable[[str, bytes], None], tmp_path: Path) -> None:
        def body(number: int) -> bytes:
            return f"{number}\n".encode() * (number % 7)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: put(f"many/{number:04}.txt", body(number)), range(1_100)))
        opened = store(f"s3://{bucket}/many/")
        files = opened.find()
        count = Count()
        paths = opened.fetch(files, tmp_path, count)
        assert [path.name for path in paths] == [f"{number:04}.txt" for number in range(1_100)]
        assert all(path.read_bytes() == body(number) for number, path in enumerate(paths))
        assert count.size_bytes == sum(file.size_bytes for file in files)

    def test_nothing_there(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        put("data/train.jsonl", b"x")
        with pytest.raises(NotFoundError, match=rf"{SETTING}=s3://{bucket}/data/tr: nothing") as caught:
            store(f"s3://{bucket}/data/tr").find()
        assert f"s3://{bucket}/data/train.jsonl" in caught.value.hint

    def test_glob_that_matches_nothing(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        put("data/a.txt", b"x")
        put("data/b.txt", b"x")
        with pytest.raises(NotFoundError, match=rf"matches nothing; 2 objects are under s3://{bucket}/data/"):
            store(f"s3://{bucket}/data/*.jsonl").find()

    def test_no_such_bucket(self) -> None:
        with pytest.raises(NotFoundError, match=r"no such bucket .NoSuchBucket") as caught:
            store("s3://no-such-bucket-here/data/x.jsonl").find()
        assert caught.value.exit_code.code == 66

    def test_revision_follows_the_content(self, bucket: str, put: Callable[[str, bytes], None]) -> None:
        put("data/a", b"1")
        put("data/b", b"2")
        opened = store(f"s3://{bucket}/data/")
        before = opened.revision(opened.find())
        assert before == opened.revision(opened.find()[::-1])
        put("data/b", b"3")
        assert before != opened.revision(opened.find())


@pytest.mark.usefixtures("s3_environment")
class TestFetch:
    @pytest.mark.parametrize("way", ["multipart", "plain"])
    def test_forty_mebibytes(self, s3_client: "S3Client", bucket: str, way: str, tmp_path: Path) -> None:
        content = os.urandom(40 * MIB + 3)
        source = tmp_path / "source"
        source.write_bytes(content)
        if way == "multipart":
            store(f"s3://{bucket}").put(source, "big.bin")
        else:
            s3_client.put_object(Bucket=bucket, Key="big.bin", Body=content)
        opened = store(f"s3://{bucket}/big.bin")
        files = opened.find()
        assert files[0].etag.endswith("-3") == (way == "multipart")
        count = Count()
        (path,) = opened.fetch(files, tmp_path / "into", count)
        assert path == tmp_path / "into" / "big.bin"
        assert path.read_bytes() == content
        assert count.size_bytes == len(content)
        assert left_over(tmp_path) == []

    def test_a_server_that_ignores_part_numbers(
        self, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = os.urandom(20 * MIB)
        (tmp_path / "source").write_bytes(content)
        opened = store(f"s3://{bucket}")
        opened.put(tmp_path / "source", "a")
        get = opened.client.get_object
        asked: list[str] = []

        def get_without_parts(**request: Any) -> Any:
            asked.extend({"PartNumber", "Range"} & set(request))
            return get(**{name: value for name, value in request.items() if name != "PartNumber"})

        monkeypatch.setattr(opened.client, "get_object", get_without_parts)
        count = Count()
        (path,) = opened.fetch(opened.find(), tmp_path / "into", count)
        assert path.read_bytes() == content
        assert count.size_bytes == len(content)
        assert set(asked) == {"PartNumber", "Range"}

    @pytest.mark.parametrize(
        ("is_damaged", "odd_bytes", "requests"),
        # What doesn't have its checksum is fetched again by the parts' numbers, in case they begin elsewhere.
        [(False, 0, 17), (True, 0, 17 + 33), (False, 500, 17 + 33)],
    )
    def test_many_parts_are_fetched_several_at_a_time(
        self, bucket: str, tmp_path: Path, flaky: "Proxy", is_damaged: bool, odd_bytes: int, requests: int
    ) -> None:
        block = os.urandom(5 * MIB)  # as small as parts may be
        parts = [block[number:] + block[:number] for number in range(32)]
        parts[7] += block[:odd_bytes]
        parts.append(block[:1_000])
        put_in_parts(bucket, "big.bin", parts, "CRC32" if odd_bytes else None)
        opened = store(f"s3://{bucket}/big.bin")
        sent = requests_of(opened)
        files = opened.find()
        flaky.flip(int(is_damaged))
        count = Count()
        (path,) = opened.fetch(files, tmp_path, count)
        assert path.read_bytes() == b"".join(parts)
        assert (flaky.faults_left, count.size_bytes) == (0, files[0].size_bytes)
        assert sent.count("GetObject") == requests

    def test_whole_object_checksums_are_verified(self, bucket: str, tmp_path: Path, flaky: "Proxy") -> None:
        # No ETag is known here, so that only the stored SHA-256 can find the damage.
        source = tmp_path / "source"
        source.write_bytes(b"0123456789" * 100)
        opened = store(f"s3://{bucket}")
        opened.put(source, "small")
        flaky.flip(1)
        assert opened.read("small") == source.read_bytes()
        assert flaky.faults_left == 0

    def test_changed_after_find(self, bucket: str, put: Callable[[str, bytes], None], tmp_path: Path) -> None:
        put("a", b"before")
        opened = store(f"s3://{bucket}/a")
        files = opened.find()
        put("a", b"after!")
        with pytest.raises(UnavailableError, match="changed while being read"):
            opened.fetch(files, tmp_path, Count())
        assert list(tmp_path.iterdir()) == []

    def test_removed_after_find(self, bucket: str, put: Callable[[str, bytes], None], tmp_path: Path) -> None:
        put("a", b"before")
        opened = store(f"s3://{bucket}")
        files = opened.find()
        opened.delete("a")
        with pytest.raises(UnavailableError, match="removed while being read"):
            opened.fetch(files, tmp_path, Count())

    @pytest.mark.parametrize("path", ["../evil", "a/../../evil", "/etc/evil", "a//b", "./a", ""])
    def test_a_key_can_not_leave_the_folder(self, bucket: str, path: str, tmp_path: Path) -> None:
        file = StoredFile(uri=f"s3://{bucket}/{path}", path=path, size_bytes=1, etag="")
        with pytest.raises(DataError, match="can't be the name of a file"):
            store(f"s3://{bucket}").fetch([file], tmp_path / "into", Count())
        assert list(tmp_path.iterdir()) == []

    def test_a_file_and_a_folder_of_one_name(
        self, bucket: str, put: Callable[[str, bytes], None], tmp_path: Path
    ) -> None:
        put("data", b"x")
        put("data/a", b"x")
        opened = store(f"s3://{bucket}")
        with pytest.raises(DataError, match="can't be written below"):
            opened.fetch(opened.find(), tmp_path, Count())
        assert left_over(tmp_path) == []


class Proxy:
    """Passes requests on to the server, and damages the bodies of the next GET answers as told."""

    def __init__(self, upstream: str) -> None:
        self.upstream = ("127.0.0.1", int(upstream.rsplit(":", 1)[1]))
        self.faults_left = 0
        self.fault = ""
        self.delay_s = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def flip(self, times: int) -> None:
        self.fault, self.faults_left = "flip", times

    def cut(self, times: int) -> None:
        self.fault, self.faults_left = "cut", times

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # One request a connection: Connection: close makes the end of the answer plain.
        with client, socket.create_connection(self.upstream) as server, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            server.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            answer, sent = b"", 0
            while b"\r\n\r\n" not in answer:
                answer += server.recv(65536)
            answer_head, _, body = answer.partition(b"\r\n\r\n")
            client.sendall(answer_head + b"\r\n\r\n")
            is_object = head.startswith(b"GET") and b"ETag:" in answer_head.replace(b"Etag:", b"ETag:")
            fault = self._take_fault() if is_object else ""
            for piece in itertools.chain([body], iter(lambda: server.recv(65536), b"")):
                if self.delay_s:
                    time.sleep(self.delay_s)
                if piece and fault:
                    if fault == "cut":
                        client.sendall(piece[: len(piece) // 2])
                        client.shutdown(socket.SHUT_RDWR)  # close alone waits for the thread that reads
                        return
                    damaged, fault = bytes([piece[0] ^ 1]) + piece[1:], ""
                    client.sendall(damaged)
                else:
                    client.sendall(piece)
                sent += len(piece)

    def _take_fault(self) -> str:
        with self._lock:
            if self.faults_left == 0:
                return ""
            self.faults_left -= 1
            return self.fault

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                server.sendall(piece)


@pytest.fixture
def flaky(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_environment["AWS_ENDPOINT_URL_S3"])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    yield proxy
    proxy.close()


def put_in_parts(bucket: str, key: str, parts: list[bytes], algorithm: str | None) -> None:
    """Upload an object in these parts, with checksums of an algorithm if there is one."""
    config = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
    extra: Any = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    with contextlib.closing(boto3.session.Session().client("s3", config=config)) as client:
        upload_id = client.create_multipart_upload(Bucket=bucket, Key=key, **extra)["UploadId"]
        upload: Any = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
        done: list[Any] = []
        for number, body in enumerate(parts, 1):
            answer = client.upload_part(**upload, PartNumber=number, Body=body, **extra)
            fields = {name: value for name, value in answer.items() if name in ("ETag", f"Checksum{algorithm}")}
            done.append({"PartNumber": number, **fields})
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": done})


@pytest.fixture
def behind_tls(s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Reach the server by TLS; the file holds the authority of its certificate, which nobody knows."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    upstream = urlsplit(s3_environment["AWS_ENDPOINT_URL_S3"])

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(upstream.hostname, upstream.port)
        transports.extend([writer.transport, server_writer.transport])
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))

    async def listen() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        loops.put((asyncio.get_running_loop(), server.sockets[0].getsockname()[1]))
        with contextlib.closing(server):
            await done.wait()
        for transport in transports:  # closing TLS takes an answer, for which the loop doesn't wait
            transport.abort()
        await asyncio.sleep(0)

    transports: list[asyncio.WriteTransport] = []
    done = asyncio.Event()
    loops: SimpleQueue[tuple[asyncio.AbstractEventLoop, int]] = SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    loop, port = loops.get()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://127.0.0.1:{port}")
    yield tmp_path / "ca.pem"
    loop.call_soon_threadsafe(done.set)
    thread.join()


def requests_of(opened: S3Store) -> list[str]:
    """Return a list that the operations will be in which botocore sends for the store, such as `PutObject`."""
    sent: list[str] = []
    opened.client.meta.events.register("before-send.s3", lambda event_name, **_: sent.append(event_name.split(".")[-1]))
    return sent


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Contents of many small objects by their names, some of which are odd."""
    odd = ["a b/ü+~*'()!@:=&?#%.txt", "%2F", "tab\t", '[x]{y}^`|<>"$,;', "e\u0301", "\u00e9", "empty"]
    return {name: name.encode() * 1_000 if name != "empty" else b"" for name in [*odd, *map(str, range(20))]}


@pytest.mark.usefixtures("s3_environment")
class TestManySmall:
    # obstore refuses a tab in a name, which the client then moves.
    SLOW = 1

    def put_all(self, opened: S3Store, contents: dict[str, bytes], folder: Path) -> None:
        files = []
        for number, (name, content) in enumerate(contents.items()):
            (folder / f"source-{number}").write_bytes(content)
            files.append((folder / f"source-{number}", name))
        opened.put_all(files)

    def test_they_go_past_botocore(
        self, s3_client: "S3Client", bucket: str, contents: dict[str, bytes], tmp_path: Path
    ) -> None:
        opened = store(f"s3://{bucket}/data")
        sent = requests_of(opened)
        self.put_all(opened, contents, tmp_path)
        assert sent == ["PutObject"] * self.SLOW
        found = opened.find()
        sent.clear()
        paths = opened.fetch(found, tmp_path / "into", Count())
        assert {str(path.relative_to(tmp_path / "into")): path.read_bytes() for path in paths} == contents
        assert sent == ["GetObject"] * self.SLOW
        head = s3_client.head_object(Bucket=bucket, Key="data/7", ChecksumMode="ENABLED")
        assert base64.b64decode(head["ChecksumSHA256"]) == hashlib.sha256(contents["7"]).digest()

    def test_what_is_refused_goes_by_botocore(self, bucket: str, contents: dict[str, bytes], tmp_path: Path) -> None:
        opened = store(f"s3://{bucket}/data")
        opened.session.get_credentials = lambda: Credentials("unknown", "wrong")  # type: ignore[method-assign]
        sent = requests_of(opened)
        self.put_all(opened, contents, tmp_path)
        paths = opened.fetch(opened.find(), tmp_path / "into", Count())
        assert {str(path.relative_to(tmp_path / "into")): path.read_bytes() for path in paths} == contents
        assert (sent.count("PutObject"), sent.count("GetObject")) == (len(contents), len(contents))

    @pytest.mark.parametrize("fault", ["flip", "cut"])
    def test_damage_is_repaired(
        self, bucket: str, contents: dict[str, bytes], flaky: "Proxy", tmp_path: Path, fault: str
    ) -> None:
        contents = {name: content for name, content in contents.items() if name.isdecimal()}
        opened = store(f"s3://{bucket}/data")
        self.put_all(opened, contents, tmp_path)
        files = opened.find()
        sent = requests_of(opened)
        getattr(flaky, fault)(1)
        count = Count()
        paths = opened.fetch(files, tmp_path / "into", count)
        assert {str(path.relative_to(tmp_path / "into")): path.read_bytes() for path in paths} == contents
        assert (flaky.faults_left, count.size_bytes) == (0, sum(map(len, contents.values())))
        assert "GetObject" in sent  # for what was damaged, at least

    def test_the_environment_does_not_lead_obstore_elsewhere(
        self, bucket: str, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What obstore alone would heed, and botocore doesn't.
        for name, value in {"AWS_ENDPOINT": "http://127.0.0.1:1", "AWS_SKIP_SIGNATURE": "true"}.items():
            monkeypatch.setenv(name, value)
        opened = store(f"s3://{bucket}/data")
        sent = requests_of(opened)
        self.put_all(opened, contents, tmp_path)
        assert sent == ["PutObject"] * self.SLOW

    def test_a_server_with_a_certificate_of_ones_own(
        self, bucket: str, behind_tls: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UnavailableError, match="no trusted TLS connection"):
            self.put_all(store(f"s3://{bucket}/data"), contents, tmp_path)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(behind_tls))
        opened = store(f"s3://{bucket}/data")
        sent = requests_of(opened)
        self.put_all(opened, contents, tmp_path)
        assert sent == ["PutObject"] * self.SLOW


class TestDamage:
    CONTENT = os.urandom(17 * MIB)  # more than one segment

    @pytest.mark.parametrize("fault", ["flip", "cut"])
    @pytest.mark.parametrize("size_bytes", [1_000, 17 * MIB])
    def test_once_is_repaired(
        self, bucket: str, put: Callable[[str, bytes], None], flaky: Proxy, tmp_path: Path, fault: str, size_bytes: int
    ) -> None:
        put("a.bin", self.CONTENT[:size_bytes])
        opened = store(f"s3://{bucket}/a.bin")
        files = opened.find()
        getattr(flaky, fault)(1)
        count = Count()
        (path,) = opened.fetch(files, tmp_path, count)
        assert path.read_bytes() == self.CONTENT[:size_bytes]
        assert flaky.faults_left == 0
        assert count.size_bytes == size_bytes
        assert left_over(tmp_path) == []

    @pytest.mark.parametrize("stored", ["SHA-256", "CRC-32", "MD5"])
    def test_in_a_multipart_object(self, bucket: str, flaky: Proxy, tmp_path: Path, stored: str) -> None:
        algorithm = None if stored == "MD5" else stored.replace("-", "")
        put_in_parts(bucket, "a.bin", [self.CONTENT[: 8 * MIB], self.CONTENT[8 * MIB :]], algorithm)
        opened = store(f"s3://{bucket}/a.bin")
        files = opened.find()
        assert files[0].etag.endswith("-2")
        flaky.flip(1)
        (path,) = opened.fetch(files, tmp_path / "into", Count())
        assert path.read_bytes() == self.CONTENT
        assert flaky.faults_left == 0
        flaky.flip(1_000)
        with pytest.raises(UnavailableError, match=f"its {stored} is not the one that is stored, 4 times over"):
            opened.fetch(files, tmp_path / "again", Count())

    @pytest.mark.parametrize(("fault", "what"), [("flip", "arrived damaged"), ("cut", "broke off")])
    def test_every_time_is_an_error(
        self, bucket: str, put: Callable[[str, bytes], None], flaky: Proxy, tmp_path: Path, fault: str, what: str
    ) -> None:
        put("a.bin", b"x" * 1_000)
        opened = store(f"s3://{bucket}/a.bin")
        files = opened.find()
        getattr(flaky, fault)(1_000)
        with pytest.raises(UnavailableError, match=what):
            opened.fetch(files, tmp_path, Count())
        assert list(tmp_path.iterdir()) == []

    def test_a_signal_ends_a_download_at_once(
        self, bucket: str, put: Callable[[str, bytes], None], flaky: Proxy, tmp_path: Path
    ) -> None:
        put("a.bin", self.CONTENT)
        opened = store(f"s3://{bucket}/a.bin")
        files = opened.find()
        flaky.delay_s = 0.1  # 17 MiB in pieces of 64 KiB: half a minute

        def stop(number: int, frame: object) -> None:
            raise PreemptedError("told to stop")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 1)
        began = time.monotonic()
        try:
            with pytest.raises(PreemptedError):
                opened.fetch(files, tmp_path, Count())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            flaky.delay_s = 0
        assert time.monotonic() - began < 2
        time.sleep(0.5)  # threads under way must not bring the file back
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("s3_environment")
class TestSlot:
    def test_put_read_delete(self, bucket: str, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"content")
        opened = store(f"s3://{bucket}/runs/1")
        assert opened.read("manifest.json") is None
        opened.put(source, "sub/manifest.json")
        assert opened.read("sub/manifest.json") == b"content"
        assert names(f"s3://{bucket}") == ["runs/1/sub/manifest.json"]
        opened.delete("sub/manifest.json")
        opened.delete("sub/manifest.json")
        assert opened.read("sub/manifest.json") is None

    def test_many_at_once(self, bucket: str, tmp_path: Path) -> None:
        sizes = {"large": 17 * MIB, "middle": 2 * MIB, **{f"small-{number}": number for number in range(40)}}
        contents = {f"sub/{name}": os.urandom(size) for name, size in sizes.items()}
        (tmp_path / "from/sub").mkdir(parents=True)
        for path, content in contents.items():
            (tmp_path / "from" / path).write_bytes(content)
        opened = store(f"s3://{bucket}/runs/1")
        opened.put_all([(tmp_path / "from" / path, path) for path in contents])
        fetched = opened.fetch(opened.find(), tmp_path / "into", Count())
        assert {path.relative_to(tmp_path / "into").as_posix(): path.read_bytes() for path in fetched} == contents

    def test_a_small_body_is_sent_without_asking_first(self, bucket: str, tmp_path: Path) -> None:
        opened = store(f"s3://{bucket}")
        asks: list[bool] = []
        opened.client.meta.events.register(
            "before-send.s3.PutObject", lambda request, **_: asks.append("Expect" in request.headers)
        )
        for size in (1_000, 300_000):
            (tmp_path / "a").write_bytes(bytes(size))
            opened.put(tmp_path / "a", "a")
        assert asks == [False, True]

    def test_empty_file(self, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        opened = store(f"s3://{bucket}")
        opened.put(tmp_path / "empty", "empty")
        assert opened.read("empty") == b""
        (path,) = opened.fetch(opened.find(), tmp_path / "into", Count())
        assert path.read_bytes() == b""

    def test_put_stores_a_checksum(self, s3_client: "S3Client", bucket: str, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"content")
        store(f"s3://{bucket}").put(tmp_path / "a", "a")
        assert "ChecksumSHA256" in s3_client.head_object(Bucket=bucket, Key="a", ChecksumMode="ENABLED")

    @pytest.mark.parametrize("act", ["put", "read", "check_writable"])
    def test_missing_bucket(self, tmp_path: Path, act: str) -> None:
        (tmp_path / "a").touch()
        opened = store("s3://no-such-bucket-here/runs")
        acts: dict[str, Callable[[], object]] = {
            "put": lambda: opened.put(tmp_path / "a", "a"),
            "read": lambda: opened.read("a"),
            "check_writable": opened.check_writable,
        }
        with pytest.raises(NotFoundError, match="no such bucket"):
            acts[act]()

    def test_swap_writes_only_what_is_still_of_that_version(self, bucket: str) -> None:
        opened = store(f"s3://{bucket}/runs/1")
        assert opened.read_version("a") is None
        assert opened.swap("a", b"1", "0" * 32) is None
        first = opened.swap("a", b"1", None)
        assert first is not None
        assert opened.read_version("a") == (b"1", first)
        assert opened.swap("a", b"2", None) is None
        second = opened.swap("a", b"2", first)
        assert second not in (None, first)
        assert opened.swap("a", b"3", first) is None
        assert opened.read_version("a") == (b"2", second)
        with pytest.raises(NotFoundError, match="no such bucket"):
            store("s3://no-such-bucket-here").swap("a", b"1", None)

    def test_of_racing_writers_one_is_first(self, bucket: str) -> None:
        # This server lets them wait for each other by the second: few rounds here, and many in tests/faults.
        assert [race(bucket, "a", writers=4) for _ in range(2)] == [1, 1]

    @pytest.mark.parametrize("version", [None, "the first"])
    def test_a_write_whose_answer_was_lost_is_ours(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch, version: str | None
    ) -> None:
        opened = store(f"s3://{bucket}")
        if version is not None:
            version = opened.swap("a", b"1", None)
        put = opened.client.put_object

        def put_twice(**request: Any) -> Any:
            put(**request)  # as botocore does when the connection breaks before the answer has come
            return put(**request)

        monkeypatch.setattr(opened.client, "put_object", put_twice)
        assert opened.swap("a", b"2", version) == hashlib.md5(b"2").hexdigest()

    def test_a_server_without_conditional_writes_is_warned_of_once(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        opened = store(f"s3://{bucket}")
        put = opened.client.put_object

        def refuse_conditions(**request: Any) -> Any:
            if {"IfMatch", "IfNoneMatch"} & set(request):
                answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
                raise ClientError(answer, "PutObject")
            return put(**request)

        monkeypatch.setattr(opened.client, "put_object", refuse_conditions)
        first = opened.swap("a", b"1", None)
        assert opened.read_version("a") == (b"1", first)
        assert opened.swap("a", b"2", first) == hashlib.md5(b"2").hexdigest()
        (warning,) = [record.getMessage() for record in caplog.records]
        assert f"two jobs on s3://{bucket} can't be kept apart" in warning

    def test_probe_leaves_nothing(self, bucket: str) -> None:
        opened = store(f"s3://{bucket}/runs/1")
        opened.check_writable()
        with pytest.raises(NotFoundError):
            store(f"s3://{bucket}").find()

    def test_read_only_identity(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name, value in seaweed.read_only_environment().items():
            monkeypatch.setenv(name, value)
        opened = store(f"s3://{READ_ONLY_BUCKET}/runs")
        with pytest.raises(DeniedError, match=rf"{SETTING}=.*access denied .AccessDenied"):
            opened.check_writable()
        (tmp_path / "a").write_bytes(b"a")
        with pytest.raises(DeniedError, match="AccessDenied"):
            opened.put(tmp_path / "a", "a")
        assert opened.read(PROBE_NAME) is None
        with pytest.raises(NotFoundError):
            opened.find()


@pytest.mark.usefixtures("s3_environment")
class TestTrouble:
    def error_of(self, uri: str) -> JobError:
        with pytest.raises(JobError) as caught:
            store(uri).find()
        assert SETTING in caught.value.message
        assert caught.value.hint
        # Nothing that a traceback would print may quote the server.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        return caught.value

    @pytest.mark.parametrize("key", ["key", "folder/", "*.jsonl"])
    def test_wrong_secret(self, seaweed: SeaweedFS, bucket: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
        error = self.error_of(f"s3://{bucket}/{key}")
        assert isinstance(error, DeniedError)
        assert "SignatureDoesNotMatch" in error.message
        self.assert_no_secrets(error, seaweed.access_key, "wrong-secret-value")

    def test_unknown_access_key(self, seaweed: SeaweedFS, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODYKNOWSME")
        error = self.error_of(f"s3://{bucket}/key")
        assert isinstance(error, DeniedError)
        assert "InvalidAccessKeyId" in error.message
        self.assert_no_secrets(error, "AKIANOBODYKNOWSME", seaweed.secret_key)

    def test_no_credentials(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        error = self.error_of(f"s3://{bucket}/key")
        assert isinstance(error, DeniedError)
        assert "no AWS credentials" in error.message

    def test_half_of_the_credentials(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        error = self.error_of(f"s3://{bucket}/key")
        assert isinstance(error, DeniedError)
        assert "incomplete" in error.message

    def test_closed_port(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        port = free_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:hunter2@127.0.0.1:{port}")
        began = time.monotonic()
        error = self.error_of(f"s3://{bucket}/key")
        assert time.monotonic() - began < 15
        assert isinstance(error, UnavailableError)
        assert f"127.0.0.1:{port} can't be reached" in error.message
        self.assert_no_secrets(error, "hunter2", "user")

    @pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "http://user:hunter2@host:port"])
    def test_malformed_endpoint(self, bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        error = self.error_of(f"s3://{bucket}/key")
        assert isinstance(error, ConfigError)
        assert "AWS_ENDPOINT_URL_S3" in error.message
        self.assert_no_secrets(error, "hunter2")

    @pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://Not_A Bucket!/key", "s3://AKIAX:hunter2@bucket/key"])
    def test_malformed_uri(self, uri: str) -> None:
        error = self.error_of(uri)
        assert isinstance(error, ConfigError)
        self.assert_no_secrets(error, "hunter2")

    def test_unknown_profile(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        assert isinstance(self.error_of(f"s3://{bucket}/key"), ConfigError)

    def assert_no_secrets(self, error: JobError, *secrets: str) -> None:
        for secret in secrets:
            assert secret not in error.message + error.hint + str(error)
