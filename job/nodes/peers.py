"""The nodes of a run: how they meet, agree, and learn of each other's end.

Every node prepares the run by itself. Then all meet at node 0 and stay connected until the adapter is published, so
that one node's end ends the others. What they say stands in `wire`, how each end behaves in `roles`.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from job.errors import ExitCode, UnavailableError
from job.log import logger, redact
from job.nodes.board import AttemptEndedError, Board
from job.nodes.link import Link, Role, listen
from job.nodes.node import Node
from job.nodes.roles import Hub, Leaf
from job.nodes.wire import PROTOCOL, Hello, Message
from job.stopping import acknowledge_stop

__all__ = ["AttemptEndedError", "Peers", "join_peers"]

_PROGRESS_S = 10.0
_PATIENCE_S = 60.0
_CAUSE_S = 30.0  # a lost node is noticed after 20 s


class Peers:
    """All nodes of a run, this one included. A run on one node has no others, and nothing here waits for any."""

    def __init__(self, node: Node, link: Link | None = None, board: Board | None = None) -> None:
        self.node_rank = node.rank
        self.nodes = node.nodes
        self._link = link
        self._board = board or Board(set())
        self._round = 0

    def exchange(self, value: Any) -> list[Any]:
        """Return what every node gave, by node rank; all nodes must call it, equally often. Values are JSON.

        Raises UnavailableError when a node is lost, or has ended.
        """
        value = json.loads(json.dumps(value))
        if self._link is None:
            return [value]
        self._link.send(Message(kind="value", node=self.node_rank, round=self._round, value=value))
        while not self._board.wait(lambda: self._board.has_values(self._round), _PATIENCE_S):
            logger.info("waiting for the other nodes")
        values = self._board.take_values(self._round)
        self._round += 1
        return values

    def check(self) -> None:
        """Raise UnavailableError when a node is lost, or has ended; AttemptEndedError when `interrupt` was called on
        another node since the last exchange."""
        self._board.check_round(self._round)

    def interrupt(self, reason: str) -> None:
        """End the others' attempts at training, as this node's has ended: their `check` raises AttemptEndedError.

        It holds until the next exchange. So after an attempt, however it ended, all nodes must exchange how, and then
        decide alike:

            try:
                launch_workers(plan, folder, peers, supervisor)
            except OutOfMemoryError as error:
                peers.interrupt(error.message)
            except AttemptEndedError:
                ...
            reports = peers.exchange(...)
        """
        if self._link is not None:
            self._link.send(Message(kind="interrupted", node=self.node_rank, round=self._round, text=redact(reason)))

    def wait_for_cause(self) -> None:
        """Raise what `check` raises as soon as there is something, for workers that lost others know not why.

        Returns when nothing was heard for half a minute, or at once on one node.
        """
        if self._link is not None:
            self._board.wait_for_trouble(self._round, _CAUSE_S)

    def wait_for_first_node(self, timeout_s: float | None = None) -> None:
        """Wait until node 0 has ended well, or the time is up. Raises UnavailableError when it, or another node,
        doesn't."""
        if self.node_rank > 0:
            self._board.wait(lambda: self._board.first_is_done, timeout_s)

    @property
    def first_address(self) -> str:
        """The IP address of node 0, as this node reaches it."""
        return "" if self._board.path is None else self._board.path.first_address

    @property
    def interface(self) -> str:
        """The network interface that leads from this node to the others, such as eth0."""
        own = "" if self._board.path is None else self._board.path.own_address
        found = (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(address.address.split("%")[0] == own for address in addresses)
        )
        return next(found, "")


@contextmanager
def join_peers(
    node: Node, *, run_id: str, output: str, explain: Callable[[BaseException], tuple[ExitCode, str]]
) -> Iterator[Peers]:
    """Meet the other nodes of a run, which publishes to `output`; stay with them for the block.

    When it is left by an error, they learn of it in the words of `explain`. Raises ConfigError when the port is taken
    or this node is no part of the run, UnavailableError when a node doesn't come in time.
    """
    if node.nodes == 1:
        yield Peers(node)
        return
    hello = Hello(protocol=PROTOCOL, node=node.rank, nodes=node.nodes, run_id=run_id, output=output)
    board = Board(set(range(1, node.nodes)) if node.rank == 0 else {0})
    link = Link(_make_role(node, hello, board), board)
    try:
        _wait_until_met(node, board)
        yield Peers(node, link, board)
    except BaseException as error:
        acknowledge_stop()
        ending, message = explain(error)
        text = f"ended with {ending.code} ({ending.name}): {redact(message)}"
        link.close(Message(kind="ended", node=node.rank, text=text))
        raise
    link.close(Message(kind="done", node=node.rank))


def _make_role(node: Node, hello: Hello, board: Board) -> Callable[[], Role]:
    if node.rank > 0:
        return lambda: Leaf(node, hello, board)
    listener = listen(node.port)
    return lambda: Hub(node, hello, board, listener)


def _wait_until_met(node: Node, board: Board) -> None:
    place = f"at port {node.port}" if node.rank == 0 else f"at {node.host}:{node.port}"
    logger.info("node %d of %d: meeting the others %s", node.rank, node.nodes, place)
    started_s, waited_s = time.monotonic(), 0.0
    while not board.wait(lambda: board.path is not None, min(_PROGRESS_S, max(0.0, node.wait_s - waited_s))):
        waited_s = time.monotonic() - started_s
        missing, why = board.missing, f" ({board.reason})" if board.reason else ""
        if not missing:  # the last has come just now
            continue
        if waited_s >= node.wait_s:
            raise UnavailableError(
                f"{_name_nodes(missing)} of {node.nodes} did not come {place} within {_format_time(node.wait_s)}{why}",
                hint="see what became of it; every node needs the same SFT_PARALLEL__NODES, HOST and PORT, and a rank "
                "of its own; SFT_PARALLEL__WAIT_MINUTES lets them wait longer",
            )
        waited, limit = _format_time(waited_s), _format_time(node.wait_s)
        logger.info("waiting for %s of %d, %s of %s%s", _name_nodes(missing), node.nodes, waited, limit, why)
    logger.info("all %d nodes are here", node.nodes)


def _name_nodes(ranks: set[int]) -> str:
    listed = [str(rank) for rank in sorted(ranks)]
    return f"node {listed[0]}" if len(listed) == 1 else f"nodes {', '.join(listed[:-1])} and {listed[-1]}"


def _format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.3g} min"
