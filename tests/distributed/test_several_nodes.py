"""Several hosts train one model: real jobs in network namespaces joined by virtual cables, which can be cut.

A namespace has network interfaces of its own and sees no others, as a host does. That takes root and iproute2. What
needs no separate network runs on this host's loopback.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import psutil
import pytest
from job_cli import SHOP, job_environment, run_job
from running_job import RunningJob, is_alive

PORT = 29400  # each namespace has ports of its own
ENDS_WITHIN_S = 60.0


class Hosts:
    """Hosts in a star: number 0 in the middle is 10.77.N.1 at its cable to host N, which is 10.77.N.2."""

    def __init__(self, count: int) -> None:
        self.names = [f"sft-{secrets.token_hex(4)}-{number}" for number in range(count)]

    def __enter__(self) -> "Hosts":
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            for number in range(1, len(self.names)):
                self._lay_cable(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _lay_cable(self, number: int) -> None:
        middle, name = self.names[0], self.names[number]
        ip("-n", middle, "link", "add", f"to{number}", "type", "veth", "peer", "name", "to0", "netns", name)
        for host, interface, address in ((middle, f"to{number}", 1), (name, "to0", 2)):
            ip("-n", host, "address", "add", f"10.77.{number}.{address}/24", "dev", interface)
            ip("-n", host, "link", "set", interface, "up")

    def cut(self, number: int) -> None:
        """Cut the cable to a host."""
        ip("-n", self.names[0], "link", "set", f"to{number}", "down")

    def start(self, number: int, environment: dict[str, str]) -> RunningJob:
        """Start a job on one core of a host."""
        core = sorted(os.sched_getaffinity(0))[number % 2]
        prefix = ("ip", "netns", "exec", self.names[number], "taskset", "--cpu-list", str(core))
        return RunningJob(environment, *prefix)

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """As many hosts as the test asks for by its parameter."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root: what happens between hosts was NOT tested")
    assert shutil.which("ip") is not None, "install iproute2: these tests make their hosts with `ip netns`"
    assert len(os.sched_getaffinity(0)) > 1, "these tests give each host a core"
    with Hosts(request.param) as made:
        yield made


def node_environment(folder: Path, model: Path, rank: int, **settings: object) -> dict[str, str]:
    """Return the environment of one node, with folders of its own and the output that all share."""
    own = folder / f"node-{rank}"
    own.mkdir(exist_ok=True)
    values: dict[str, object] = {
        "MODEL__ID": model,
        "DATA__URI": SHOP / "train.jsonl",
        "OUTPUT__URI": folder / "slot",
        "PARALLEL__NODES": 2,
        "PARALLEL__NODE_RANK": rank,
        "PARALLEL__HOST": f"10.77.{rank}.1",
        "PARALLEL__PORT": PORT,
    }
    return job_environment(own, **(values | settings))


def wait(job: RunningJob, timeout_s: float = 120) -> tuple[int, dict[str, Any]]:
    """Wait for the end of a job; return its exit code and outcome, once nothing of it is left."""
    try:
        code = job.process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still runs after {timeout_s:g} s:\n{job.output}")
    assert [process for process in job.strays() if is_alive(process)] == []
    return code, json.loads(job.log.read_text()) if job.log.exists() else {}


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_two_hosts_learn_what_one_with_two_processes_learns(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    training = {"TRAIN__MAX_STEPS": 4, "TRAIN__MAX_GRAD_NORM": 0.1}
    environments = [node_environment(tmp_path, tiny_model, rank, **training) for rank in (0, 1)]
    with hosts.start(1, environments[1]) as second, hosts.start(0, environments[0]) as first:
        ends = [wait(first), wait(second)]
    assert [code for code, _ in ends] == [0, 0], first.output + second.output
    assert ends[0][1]["run_id"] == ends[1][1]["run_id"]
    assert "step 4/4" in first.output
    assert "step 4/4" not in second.output  # node 0 logs the steps
    assert "which node 0 does" in second.output
    manifest = json.loads((tmp_path / "slot" / "manifest.json").read_text())
    assert (manifest["plan"]["nodes"], manifest["plan"]["processes"]) == (2, 1)

    alone = job_environment(
        tmp_path / "alone",
        MODEL__ID=tiny_model,
        DATA__URI=SHOP / "train.jsonl",
        OUTPUT__URI=tmp_path / "slot-alone",
        PARALLEL__PROCESSES=2,
        **training,
    )
    assert run_job(alone).code == 0
    published = json.loads((tmp_path / "slot-alone" / "manifest.json").read_text())
    assert (published["plan"]["nodes"], published["plan"]["processes"]) == (1, 2)
    assert published["run_id"] == manifest["run_id"]
    # Two processes on one host have a core each, as the hosts have: the same arithmetic, bit for bit.
    name = "adapter_model.safetensors"
    assert (tmp_path / "slot" / name).read_bytes() == (tmp_path / "slot-alone" / name).read_bytes()

    again = run_job(environments[1])  # by itself, for it has nobody to wait for
    assert again.code == 0, again.output
    assert "already published" in again.output


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_cut_cable_ends_both_sides(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    training = {"TRAIN__MAX_STEPS": 100_000, "TRAIN__LOGGING_STEPS": 1}
    environments = [node_environment(tmp_path, tiny_model, rank, **training) for rank in (0, 1)]
    with hosts.start(0, environments[0]) as first, hosts.start(1, environments[1]) as second:
        first.wait_for("step 2/")
        hosts.cut(1)
        cut_s = time.monotonic()
        ends = [wait(job, ENDS_WITHIN_S) for job in (first, second)]
        assert time.monotonic() - cut_s < ENDS_WITHIN_S
    for (code, outcome), other, job in zip(ends, (1, 0), (first, second), strict=True):
        assert code == 69, job.output
        assert f"node {other} (10.77.1.{other + 1}) is lost: nothing was heard from it for 20 s" in outcome["message"]
        assert outcome["hint"]
    assert ends[0][1]["step"] >= 2
    assert list(tmp_path.rglob("manifest.json")) == []


@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_third_host_with_other_data_is_refused_by_name(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    rows = (SHOP / "train.jsonl").read_text().splitlines(keepends=True)
    data = [tmp_path / f"rows-{rank}" for rank in range(3)]
    for rank, folder in enumerate(data):
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(rows[:-1] if rank == 2 else rows))
    (tmp_path / "slot").mkdir()
    environments = [
        node_environment(tmp_path, tiny_model, rank, PARALLEL__NODES=3, DATA__URI=data[rank]) for rank in range(3)
    ]
    with (
        hosts.start(0, environments[0]) as first,
        hosts.start(1, environments[1]) as second,
        hosts.start(2, environments[2]) as third,
    ):
        ends = [wait(job) for job in (first, second, third)]
    for code, outcome in ends:
        assert code == 65, first.output
        assert f"node 2 differs from node 0: SFT_DATA__URI={data[2]}/train.jsonl has sha256" in outcome["message"]
        assert "node 1 differs" not in outcome["message"]  # its data lie elsewhere and are the same
    assert list((tmp_path / "slot").iterdir()) == []


@pytest.fixture
def loopback(tiny_model: Path, tmp_path: Path) -> list[dict[str, str]]:
    """Two nodes on this host that train for hours, and meet at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"PARALLEL__HOST": "127.0.0.1", "PARALLEL__PORT": port, "TRAIN__MAX_STEPS": 100_000}
    return [node_environment(tmp_path, tiny_model, rank, **settings) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("number", "rank", "processes", "own_code", "code", "said"),
    [
        (SIGKILL, None, 1, -SIGKILL, 69, "node 1 (127.0.0.1) is lost: "),
        (SIGKILL, 3, 2, 70, 69, "node 1 ended with 70 (internal): worker 3 of 4 died without saying why"),
        (SIGTERM, None, 1, 75, 75, "stopped, for another node was told to, after step "),
    ],
)
def test_the_end_of_one_node_ends_the_other(
    loopback: list[dict[str, str]],
    number: signal.Signals,
    rank: int | None,
    processes: int,
    own_code: int,
    code: int,
    said: str,
) -> None:
    """The signal goes to node 1's job, or to its worker of a rank."""
    environments = [environment | {"SFT_PARALLEL__PROCESSES": str(processes)} for environment in loopback]
    with RunningJob(environments[0]) as first, RunningJob(environments[1]) as second:
        first.wait_for("step 1/")
        started = [*first.descendants(), *second.descendants()]
        psutil.Process(second.process.pid if rank is None else second.worker(rank).pid).send_signal(number)
        killed_s = time.monotonic()
        first_code, outcome = wait(first, ENDS_WITHIN_S)
        assert first_code == code, first.output
        assert said in outcome["message"]
        assert wait(second, ENDS_WITHIN_S)[0] == own_code, second.output
        assert time.monotonic() - killed_s < ENDS_WITHIN_S
        assert [process for process in started if is_alive(process)] == []


def test_a_node_that_never_comes_is_named_at_the_limit(loopback: list[dict[str, str]]) -> None:
    ended = run_job(loopback[0] | {"SFT_PARALLEL__WAIT_MINUTES": "0.05", "SFT_PARALLEL__NODES": "3"})
    assert ended.code == 69, ended.output
    assert "nodes 1 and 2 of 3 did not come" in ended.outcome["message"]
    assert "SFT_PARALLEL__WAIT_MINUTES" in ended.outcome["hint"]
    assert "== training" not in ended.output


def test_only_node_0_writes_to_the_output(loopback: list[dict[str, str]], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((SHOP / "train.jsonl").read_text() + '{"prompt": "unanswered"}\n')
    ended = run_job(loopback[1] | {"SFT_DATA__URI": str(rows), "SFT_PARALLEL__WAIT_MINUTES": "0.05"})
    assert ended.code == 65, ended.output
    assert str(tmp_path / "node-1") in ended.outcome["hint"]  # where the list of bad rows is
    assert not (tmp_path / "slot").exists()
