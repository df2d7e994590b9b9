"""Nodes meet, agree, and learn of each other's end; strangers at the port do no harm. Each node is a thread here."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from job.errors import INTERNAL, ConfigError, ExitCode, JobError, ResourcesError, UnavailableError
from job.nodes import link, peers, wire
from job.nodes.node import Node
from job.nodes.peers import AttemptEndedError, Peers, join_peers

HELLO = {"protocol": 1, "node": 1, "nodes": 2, "run_id": "run", "output": "out"}
Body = Callable[[Peers], Any]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes seconds takes less."""
    monkeypatch.setattr(wire, "SILENT_S", 2.0)
    monkeypatch.setattr(link, "BEAT_S", 0.2)
    monkeypatch.setattr(peers, "_PROGRESS_S", 0.2)
    monkeypatch.setattr(peers, "_CAUSE_S", 0.5)


def explain(error: BaseException) -> tuple[ExitCode, str]:
    return (error.exit_code, error.message) if isinstance(error, JobError) else (INTERNAL, str(error))


class Nodes:
    """Starts nodes, each in a thread; what their bodies return or raise is the result."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._threads = ThreadPoolExecutor()

    def start(
        self,
        rank: int,
        body: Body,
        *,
        nodes: int = 2,
        wait_s: float = 20,
        host: str = "127.0.0.1",
        run_id: str = "run",
        output: str = "out",
    ) -> "Future[Any]":
        node = Node(rank, nodes, "" if rank == 0 else host, self.port, wait_s)

        def live() -> Any:
            with join_peers(node, run_id=run_id, output=output, explain=explain) as met:
                return body(met)

        return self._threads.submit(live)

    def say(self, words: bytes) -> socket.socket:
        """Connect to node 0 by hand, once it listens, and send this."""
        for _ in range(100):
            try:
                connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        connection.sendall(words)
        return connection

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def nodes(port: int) -> Iterator[Nodes]:
    with closing(Nodes(port)) as started:
        yield started


def frame(message: dict[str, Any]) -> bytes:
    words = json.dumps(message).encode()
    return struct.pack("!I", len(words)) + words


def finish(met: Peers) -> str:
    met.wait_for_first_node()
    return "well"


def test_one_node_has_no_others() -> None:
    with join_peers(Node(0, 1, "", 1, 1), run_id="run", output="out", explain=explain) as alone:
        assert alone.exchange({"a": (1, 2)}) == [{"a": [1, 2]}]
        alone.interrupt("out of memory")
        alone.check()
        alone.wait_for_cause()
        alone.wait_for_first_node()
    assert (alone.node_rank, alone.nodes, alone.first_address) == (0, 1, "")


def test_three_nodes_exchange_and_the_others_outlive_the_first(nodes: Nodes) -> None:
    left: list[int] = []

    def body(met: Peers) -> Any:
        rounds = [met.exchange({"rank": met.node_rank, "round": number}) for number in range(20)]
        large = met.exchange("x" * 5_000_000)
        met.check()
        if met.node_rank == 0:
            time.sleep(1)
            left.append(0)
        met.wait_for_first_node()
        return rounds, [len(text) for text in large], met.first_address, met.interface, list(left)

    started = [nodes.start(rank, body, nodes=3) for rank in (2, 1, 0)]
    for future in started:
        rounds, sizes, address, interface, others = future.result(timeout=30)
        assert rounds == [[{"rank": rank, "round": number} for rank in range(3)] for number in range(20)]
        assert sizes == [5_000_000] * 3
        assert (address, interface) == ("127.0.0.1", "lo")
        assert others == [0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_that_fails_ends_the_others_with_its_code_and_words(
    nodes: Nodes, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")

    def body(met: Peers) -> None:
        if met.node_rank == failing:
            raise ResourcesError("out of memory with very-secret")
        if met.node_rank == 2:
            met.exchange("never answered")
        while True:
            met.check()
            time.sleep(0.01)

    started = {rank: nodes.start(rank, body, nodes=3) for rank in range(3)}
    for rank, future in started.items():
        error = future.exception(timeout=30)
        if rank == failing:
            assert isinstance(error, ResourcesError)
        else:
            assert isinstance(error, UnavailableError)
            assert error.message == f"node {failing} ended with 71 (resources): out of memory with ***"
            assert error.hint


def test_an_attempt_that_ends_on_one_node_ends_on_all_until_they_have_spoken_of_it(nodes: Nodes) -> None:
    def body(met: Peers) -> list[str]:
        seen = []
        for attempt in range(3):
            met.exchange("about to start")
            if met.node_rank == attempt:
                met.interrupt("out of memory at 8")
                met.check()  # its own doesn't come back
            else:
                with pytest.raises(AttemptEndedError) as caught:
                    met.wait_for_cause()
                seen.append(str(caught.value))
                with pytest.raises(AttemptEndedError):
                    met.check()
            met.exchange("how it went")
            met.check()
        return seen

    words = [f"node {rank}: out of memory at 8" for rank in range(3)]
    for rank, future in [(rank, nodes.start(rank, body, nodes=3)) for rank in range(3)]:
        assert future.result(timeout=30) == [text for other, text in enumerate(words) if other != rank]


def test_no_cause_is_known_when_nobody_has_any(nodes: Nodes) -> None:
    started = [nodes.start(rank, lambda met: (met.wait_for_cause(), finish(met))[1]) for rank in (0, 1)]
    assert [future.result(timeout=30) for future in started] == ["well", "well"]


@pytest.mark.parametrize("ending", ["silence", "close", "garbage"])
def test_a_lost_node_is_named_to_all(nodes: Nodes, ending: str) -> None:
    def body(met: Peers) -> None:
        met.exchange(None)

    started = [nodes.start(rank, body, nodes=3) for rank in (0, 1)]
    with nodes.say(frame(HELLO | {"node": 2, "nodes": 3})) as lost:
        while b'"met"' not in lost.recv(4096):  # until then it may come again
            pass
        if ending == "garbage":
            lost.sendall(frame({"kind": "no such"}))
        if ending == "close":
            lost.shutdown(socket.SHUT_RDWR)
        errors = [future.exception(timeout=30) for future in started]
    why = {"silence": "nothing was heard from it for", "close": "without a word|broke", "garbage": "what no node sends"}
    for error in errors:
        assert isinstance(error, UnavailableError)
        assert error.message.startswith("node 2 (127.0.0.1) is lost: ")
        assert any(words in error.message for words in why[ending].split("|")), error.message


def test_a_lost_first_node_is_named(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", nodes.port)) as first:
        leaf = nodes.start(1, lambda met: met.exchange(None))
        connection = first.accept()[0]
        connection.sendall(frame({"kind": "met"}))
        error = leaf.exception(timeout=30)
        connection.close()
    assert isinstance(error, UnavailableError)
    assert "node 0 (127.0.0.1) is lost: nothing was heard from it for 2 s" in error.message


STRANGERS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\xff\xff\xff\xff" + b"a" * 1000,
    b"\x00\x00\x00\x03{{{",
    b"\x00\x00\x10\x00" + b"[" * 4096,
    struct.pack("!I", 1000) + b"half of it",
    frame({"kind": "ended", "node": 1, "text": "not for strangers"}),
    frame(HELLO | {"node": "1"}),
    frame(HELLO | {"and": "more"}),
    b"",
]


def test_strangers_do_no_harm(nodes: Nodes) -> None:
    first = nodes.start(0, finish)
    connections = [nodes.say(words) for words in STRANGERS]
    for connection in connections[::2]:
        connection.close()
    assert nodes.start(1, finish).result(timeout=30) == "well"
    assert first.result(timeout=30) == "well"
    for connection in connections:
        connection.close()


def test_a_node_of_another_run_is_refused_alone(nodes: Nodes) -> None:
    first = nodes.start(0, finish, wait_s=6)
    error = nodes.start(1, finish, run_id="other", output="elsewhere").exception(timeout=30)
    assert isinstance(error, ConfigError)
    for said in ("run other", "elsewhere", "run run", "out", f":{nodes.port}"):
        assert said in error.message
    assert nodes.start(1, finish).result(timeout=30) == "well"
    assert first.result(timeout=30) == "well"


@pytest.mark.parametrize(
    ("rank", "count", "said"),
    [(2, 3, "it is node 2 with SFT_PARALLEL__NODES=3, and node 0 has 2"), (5, 9, "node 5")],
)
def test_a_node_too_many_is_refused(nodes: Nodes, rank: int, count: int, said: str) -> None:
    first = nodes.start(0, finish, wait_s=3)
    error = nodes.start(rank, finish, nodes=count).exception(timeout=30)
    assert isinstance(error, ConfigError)
    assert said in error.message
    error = first.exception(timeout=30)
    assert isinstance(error, UnavailableError)
    assert said in error.message  # why the one that is missing may not come


def test_missing_nodes_are_named_at_the_limit_with_progress(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sft_job")
    started = [nodes.start(rank, finish, nodes=4, wait_s=3) for rank in (0, 2)]
    errors = [future.exception(timeout=30) for future in started]
    for error in errors:
        assert isinstance(error, UnavailableError)
        assert "nodes 1 and 3 of 4 did not come at" in error.message
        assert "within 3 s" in error.message
    assert any("SFT_PARALLEL__WAIT_MINUTES" in error.hint for error in errors)  # whose time is up first
    assert "waiting for nodes 1 and 3 of 4, 1 s of 3 s" in caplog.text


def test_a_host_that_never_resolves_is_named_at_the_limit(nodes: Nodes) -> None:
    error = nodes.start(1, finish, host="node-0.invalid", wait_s=2).exception(timeout=30)
    assert isinstance(error, UnavailableError)
    assert f"node 0 of 2 did not come at node-0.invalid:{nodes.port} within 2 s" in error.message
    assert "[Errno -" in error.message


def test_a_port_in_use_is_a_wrong_setting(nodes: Nodes) -> None:
    with socket.create_server(("", nodes.port)):
        error = nodes.start(0, finish).exception(timeout=30)
    assert isinstance(error, ConfigError)
    assert error.message == f"SFT_PARALLEL__PORT={nodes.port}: in use on this host"


def test_a_node_may_come_again_before_all_have_met(nodes: Nodes) -> None:
    first = nodes.start(0, finish, nodes=3)
    with nodes.say(frame(HELLO | {"nodes": 3})) as early:
        assert b"waiting" in early.recv(4096)
        twin = nodes.start(1, finish, nodes=3)
        time.sleep(1.5)
        assert not twin.done()  # it waits for its place, which the other has
    others = [twin, nodes.start(2, finish, nodes=3)]
    assert [future.result(timeout=30) for future in (first, *others)] == ["well"] * 3


def test_two_nodes_of_one_rank_are_told_of_it(nodes: Nodes) -> None:
    first = nodes.start(0, finish, nodes=3, wait_s=4)
    twins = [nodes.start(1, finish, nodes=3, wait_s=3) for _ in range(2)]
    said = [str(future.exception(timeout=30)) for future in (first, *twins)]
    assert any("SFT_PARALLEL__NODE_RANK may be given twice" in text for text in said[1:])


def test_no_thread_is_left(nodes: Nodes) -> None:
    started = [nodes.start(rank, finish) for rank in (0, 1)]
    for future in started:
        future.result(timeout=30)
    assert "peers" not in {thread.name for thread in threading.enumerate()}
