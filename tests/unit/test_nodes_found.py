"""Which node this is, and where node 0 is: from the settings, or from a Kubernetes Indexed Job."""

import socket
from collections.abc import Callable

import pytest

from job.errors import ConfigError
from job.nodes.node import Node, find_node
from job.settings import Settings

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setattr(socket, "getfqdn", lambda: "some-host")


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def become(index: str, name: str) -> None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
        monkeypatch.setattr(socket, "getfqdn", lambda: name)

    return become


def test_one_node_needs_nothing(load: Load, pod: Callable[[str, str], None]) -> None:
    assert find_node(load().parallel) == Node(rank=0, nodes=1, host="", port=29400, wait_s=900)
    pod("3", "many-runs-3.svc.ns")  # an Indexed Job of runs that have nothing to do with each other
    assert find_node(load().parallel).rank == 0


def test_settings_say_it(load: Load) -> None:
    asked = {"PARALLEL__NODES": 3, "PARALLEL__HOST": "10.0.0.1", "PARALLEL__PORT": 1234, "PARALLEL__WAIT_MINUTES": 0.5}
    assert find_node(load(PARALLEL__NODE_RANK=2, **asked).parallel) == Node(2, 3, "10.0.0.1", 1234, 30)
    assert find_node(load(PARALLEL__NODE_RANK=0, **asked).parallel).host == ""


@pytest.mark.parametrize(
    ("index", "name", "host"),
    [
        ("0", "tune-0.peers.ml.svc.cluster.local", ""),
        ("1", "tune-1.peers.ml.svc.cluster.local", "tune-0.peers.ml.svc.cluster.local"),
        ("11", "tune-1-11.peers.ml.svc", "tune-1-0.peers.ml.svc"),
    ],
)
def test_an_indexed_job_says_it(load: Load, pod: Callable[[str, str], None], index: str, name: str, host: str) -> None:
    pod(index, name)
    node = find_node(load(PARALLEL__NODES=12).parallel)
    assert (node.rank, node.host) == (int(index), host)


@pytest.mark.parametrize("name", ["tune-1", "tune-1-x2k4p.peers.ml.svc", "tune-11.peers.ml.svc", "localhost"])
def test_a_pod_without_a_headless_service_must_be_told_the_host(
    load: Load, pod: Callable[[str, str], None], name: str
) -> None:
    pod("1", name)
    with pytest.raises(ConfigError, match=f"^SFT_PARALLEL__HOST=auto: .*{name}") as caught:
        find_node(load(PARALLEL__NODES=2).parallel)
    assert "headless service" in caught.value.hint


@pytest.mark.parametrize(
    ("variables", "index", "problem"),
    [
        ({"PARALLEL__NODES": 2}, None, "SFT_PARALLEL__NODE_RANK=auto: .*JOB_COMPLETION_INDEX"),
        ({"PARALLEL__NODES": 2}, "one", "JOB_COMPLETION_INDEX=one: not a number"),
        ({"PARALLEL__NODES": 2}, "2", "JOB_COMPLETION_INDEX=2: .*SFT_PARALLEL__NODES=2"),
        ({"PARALLEL__NODES": 2, "PARALLEL__NODE_RANK": 5}, "1", "SFT_PARALLEL__NODE_RANK=5: .*SFT_PARALLEL__NODES=2"),
        ({"PARALLEL__NODE_RANK": 1}, None, "SFT_PARALLEL__NODE_RANK=1: .*SFT_PARALLEL__NODES=1"),
    ],
)
def test_a_rank_that_cannot_be(
    load: Load, monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], index: str | None, problem: str
) -> None:
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    with pytest.raises(ConfigError, match=f"^{problem}") as caught:
        find_node(load(**variables).parallel)
    assert caught.value.hint
