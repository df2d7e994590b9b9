"""TERM and KILL of any process of the job in any phase: no process is left behind, and no manifest.

The job is stopped where it says that it is: a line of its output announces each phase. Phases that are over in no time
are held open by a server that does not answer.
"""

import json
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest
from job_cli import SHOP, TIMEOUT_S, job_environment
from running_job import RunningJob, is_alive
from seaweed import SeaweedFS

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

GONE_WITHIN_S = 30.0  # what Kubernetes grants between SIGTERM and SIGKILL
PHASES = ("reading the inputs", "tokenizing", "fetching the base model", "training", "publishing")


def kill(job: RunningJob, victim: int, number: signal.Signals, *, expected_code: int) -> dict[str, Any]:
    """Send a signal to one process, see the job end with this code and nothing of it live on; return the outcome."""
    before = job.descendants()
    psutil.Process(victim).send_signal(number)
    deadline_s = time.monotonic() + GONE_WITHIN_S
    try:
        job.process.wait(timeout=GONE_WITHIN_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the job still runs {GONE_WITHIN_S:g} s later; it said:\n{job.output}")
    while alive := [process for process in {*before, *job.strays()} if is_alive(process)]:
        assert time.monotonic() < deadline_s, f"left behind: {alive}\n{job.output}"
        time.sleep(0.05)
    assert job.process.returncode == expected_code, job.output
    outcome: dict[str, Any] = json.loads(job.log.read_text()) if job.log.exists() else {}
    if number == SIGKILL and victim == job.process.pid:
        assert outcome == {}
    else:
        assert outcome["code"] == expected_code, outcome
    return outcome


def kill_parent(job: RunningJob, number: signal.Signals, *, phase: str) -> None:
    """Send a signal to the job itself, and check that it ended in this phase as that signal asks."""
    outcome = kill(job, job.process.pid, number, expected_code=-SIGKILL if number == SIGKILL else 75)
    assert [name for name in PHASES if f"== {name}" in job.output][-1] == phase
    if number != SIGKILL:
        assert outcome["name"] == "preempted"
        assert number.name in outcome["message"]
        assert outcome["hint"]
        assert "Traceback" not in job.output


class StallingProxy:
    """Stands before a server and passes everything on, but holds a connection for good at a request that matches."""

    def __init__(self, server_port: int, pattern: bytes) -> None:
        self.stalled = threading.Event()
        self._pattern = re.compile(pattern)
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._all: list[socket.socket] = [self._listener]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for sock in self._all:
            sock.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            for sock in select.select([self._listener, *self._peers], [], [], 0.05)[0]:
                if sock is self._listener:
                    self._connect(sock.accept()[0])
                elif sock in self._peers:
                    self._pass_on(sock)

    def _connect(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._server_port))
        self._peers |= {client: server, server: client}
        self._clients.add(client)
        self._all += [client, server]

    def _pass_on(self, sock: socket.socket) -> None:
        peer = self._peers[sock]
        try:
            data = sock.recv(65536)
            if sock in self._clients and self._pattern.search(data):
                del self._peers[sock], self._peers[peer]
                self.stalled.set()
            elif data:
                peer.sendall(data)
            else:
                raise ConnectionError
        except ConnectionError:
            for end in (sock, peer):
                del self._peers[end]
                end.close()


# -- on the disk: tokenizing and training ------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tiny_model: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A job that trains for hours; afterwards there is no manifest."""
    slot = tmp_path / "slot"
    yield job_environment(
        tmp_path, MODEL__ID=tiny_model, DATA__URI=SHOP / "train.jsonl", OUTPUT__URI=slot, TRAIN__MAX_STEPS=100_000
    )
    assert list(slot.rglob("manifest.json")) == []


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_parent_while_tokenizing(on_disk: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text((SHOP / "train.jsonl").read_text() * 500)
    with RunningJob(on_disk | {"SFT_DATA__URI": str(data)}) as job:
        job.wait_for("== tokenizing")
        kill_parent(job, number, phase="tokenizing")


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_parent_while_workers_start(on_disk: dict[str, str], number: signal.Signals) -> None:
    with RunningJob(on_disk) as job:
        job.wait_for("== training")
        kill_parent(job, number, phase="training")


@pytest.mark.parametrize(
    ("number", "processes", "engine"),
    [(SIGTERM, 2, "ddp"), (SIGKILL, 2, "ddp"), (SIGINT, 1, "ddp"), (SIGTERM, 2, "zero3"), (SIGKILL, 1, "zero2")],
)
def test_parent_while_training(on_disk: dict[str, str], number: signal.Signals, processes: int, engine: str) -> None:
    with RunningJob(on_disk | {"SFT_PARALLEL__PROCESSES": str(processes), "SFT_PARALLEL__ENGINE": engine}) as job:
        job.wait_for("step 1/")
        assert len(job.descendants()) == processes + (processes > 1 or engine != "ddp")  # with a launcher
        kill_parent(job, number, phase="training")


@pytest.mark.parametrize(
    ("number", "rank", "engine"),
    [(SIGTERM, 0, "ddp"), (SIGTERM, 1, "ddp"), (SIGKILL, 0, "ddp"), (SIGKILL, 1, "ddp"), (SIGKILL, 0, "zero3")],
)
def test_worker(on_disk: dict[str, str], rank: int, number: signal.Signals, engine: str) -> None:
    with RunningJob(on_disk | {"SFT_PARALLEL__PROCESSES": "2", "SFT_PARALLEL__ENGINE": engine}) as job:
        job.wait_for("step 1/")
        outcome = kill(job, job.worker(rank).pid, number, expected_code=70)
    assert f"worker {rank} of 2 " in outcome["message"]
    assert f"worker {1 - rank} of 2 " not in outcome["message"]
    assert outcome["name"] == "internal"
    assert outcome["hint"]


def test_the_only_worker(on_disk: dict[str, str]) -> None:
    with RunningJob(on_disk | {"SFT_PARALLEL__PROCESSES": "1"}) as job:
        job.wait_for("step 1/")
        outcome = kill(job, job.worker(0).pid, SIGKILL, expected_code=70)
    assert outcome["message"] == "worker 0 of 1 died without saying why (killed by SIGKILL)"
    assert outcome["hint"]


def test_worker_whose_peer_is_ended_before_it_notices(on_disk: dict[str, str]) -> None:
    with RunningJob(on_disk | {"SFT_PARALLEL__PROCESSES": "2"}) as job:
        job.wait_for("step 1/")
        peer = job.worker(0)
        peer.suspend()  # as if it were busy when the launcher sends it SIGTERM
        waking = threading.Timer(1.5, peer.resume)
        waking.start()
        outcome = kill(job, job.worker(1).pid, SIGKILL, expected_code=70)
        waking.join()
    assert "worker 1 of 2 " in outcome["message"]
    assert "worker 0 of 2 " not in outcome["message"]


def test_launcher(on_disk: dict[str, str]) -> None:
    with RunningJob(on_disk | {"SFT_PARALLEL__PROCESSES": "2"}) as job:
        job.wait_for("step 1/")
        outcome = kill(job, job.launcher().pid, SIGKILL, expected_code=70)
    assert "launcher" in outcome["message"]
    assert "SIGKILL" in outcome["message"]
    assert "worker 0" not in outcome["message"]  # both died because of it
    assert outcome["hint"]


# -- in S3, through a server that stops answering: reading, fetching and publishing ------------------------------------


@contextmanager
def on_s3(
    seaweed: SeaweedFS, s3_client: "S3Client", bucket: str, tiny_model: Path, folder: Path, *, stall: str
) -> Iterator[RunningJob]:
    """Run a job with all of its files in S3 until it sends the request that is never answered."""
    for file in tiny_model.iterdir():
        s3_client.upload_file(str(file), bucket, f"model/{file.name}")
    s3_client.upload_file(str(SHOP / "train.jsonl"), bucket, "data/train.jsonl")
    environment = seaweed.environment() | job_environment(
        folder,
        MODEL__ID=f"s3://{bucket}/model",
        DATA__URI=f"s3://{bucket}/data/train.jsonl",
        DATA__EVAL_FRACTION=0,
        OUTPUT__URI=f"s3://{bucket}/out",
        TRAIN__MAX_STEPS=1,
        RUNTIME__GRACE_SECONDS=5,
    )
    port = int(seaweed.endpoint.rsplit(":", 1)[1])
    with StallingProxy(port, stall.encode()) as proxy:
        environment["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        with RunningJob(environment) as job:
            assert proxy.stalled.wait(TIMEOUT_S), job.output
            yield job
    keys = [item["Key"] for item in s3_client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert "data/train.jsonl" in keys
    assert [key for key in keys if key.endswith("manifest.json")] == []


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
@pytest.mark.parametrize(
    ("phase", "request_line"),
    [
        ("reading the inputs", "GET /[^ ]*/out/manifest.json"),
        ("reading the inputs", "GET /[^ ]*/data/train.jsonl"),
        ("tokenizing", "GET /[^ ]*/model/tokenizer.json"),
        ("fetching the base model", "GET /[^ ]*/model/model.safetensors"),
    ],
)
def test_parent_while_downloading(
    seaweed: SeaweedFS,
    s3_client: "S3Client",
    bucket: str,
    tiny_model: Path,
    tmp_path: Path,
    phase: str,
    request_line: str,
    number: signal.Signals,
) -> None:
    with on_s3(seaweed, s3_client, bucket, tiny_model, tmp_path, stall=request_line) as job:
        job.wait_for(f"== {phase}")
        assert ("are fetched meanwhile" in job.output) == (phase == "fetching the base model")  # while tokenizing
        kill_parent(job, number, phase=phase)


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_parent_before_a_server_that_never_answers(
    tiny_model: Path, tmp_path: Path, seaweed: SeaweedFS, number: signal.Signals
) -> None:
    environment = seaweed.environment() | job_environment(
        tmp_path, MODEL__ID=tiny_model, DATA__URI="s3://bucket/train.jsonl", OUTPUT__URI=tmp_path / "slot"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with RunningJob(environment) as job:
            job.wait_for("== reading the inputs")
            with silent.accept()[0]:
                kill_parent(job, number, phase="reading the inputs")
    assert list((tmp_path / "slot").rglob("*")) == []


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_parent_while_publishing(
    seaweed: SeaweedFS,
    s3_client: "S3Client",
    bucket: str,
    tiny_model: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    stall = "PUT /[^ ]*/out/adapter_model.safetensors"
    with on_s3(seaweed, s3_client, bucket, tiny_model, tmp_path, stall=stall) as job:
        time.sleep(2)  # until the whole request is under way: before that, boto3 itself ends it
        killed_s = time.monotonic()
        kill_parent(job, number, phase="publishing")
        assert time.monotonic() - killed_s < 5 + 10  # the grace period; boto3's own end waits 20 s for the answer
