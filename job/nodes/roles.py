"""The two ends of the connections among nodes: node 0 is the hub, which all others are connected to.

Everything here runs in the event loop of `link`'s thread. What is learned stands on the board.
"""

import asyncio
import socket
from typing import Any

from job.errors import ConfigError
from job.log import logger
from job.nodes.board import Board, Path
from job.nodes.node import Node
from job.nodes.wire import HELLO_LIMIT_BYTES, PROTOCOL, WIRE_ERRORS, Hello, Message, Wire, explain_loss

_HANDSHAKE_S = 10.0
_PAUSE_S = 1.0


class Hub:
    """Node 0: listens, knows who is here, gathers what they give and passes on what they say."""

    def __init__(self, node: Node, hello: Hello, board: Board, listener: socket.socket) -> None:
        self._node = node
        self._hello = hello
        self._board = board
        self._listener = listener
        self._wires: dict[int, Wire] = {}
        self._left: set[int] = set()
        self._has_met = asyncio.Event()
        self._given: dict[int, dict[int, Any]] = {}  # by round and node

    async def run(self) -> None:
        """Listen until all are here, and serve them."""
        server = await asyncio.start_server(self._welcome, sock=self._listener)
        try:
            await self._has_met.wait()
        finally:
            server.close()  # those who have come stay
        await asyncio.Event().wait()

    def send(self, message: Message) -> None:
        """Pass on what node 0 says."""
        if message.kind == "value":
            self._gather(message, 0)
        else:
            self._tell(message)

    def wires(self) -> list[Wire]:
        """Return the open connections."""
        return list(self._wires.values())

    def is_alone(self) -> bool:
        """Say whether all others have said goodbye."""
        return not set(self._wires) - self._left

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            await self._listen_to(wire)
        finally:
            wire.abort()  # where the thread ends before the connection

    async def _listen_to(self, wire: Wire) -> None:
        try:
            words = await wire.receive(limit_bytes=HELLO_LIMIT_BYTES, timeout_s=_HANDSHAKE_S)
            hello = Hello.model_validate_json(words)
        except WIRE_ERRORS as error:
            logger.debug("a stranger at port %d: %s", self._node.port, explain_loss(error))
            await wire.close(timeout_s=1)
            return
        refusal = self._refuse(hello)
        if refusal is None:
            await self._serve(hello.node, wire)
        else:
            self._board.note(reason=f"{wire.remote_address} was refused: {refusal.text}")
            wire.send(refusal)
            await wire.close(timeout_s=_HANDSHAKE_S)

    def _refuse(self, hello: Hello) -> Message | None:
        """Return why a node can't take part, None if it can."""
        own = self._hello
        if hello.protocol != PROTOCOL:
            text = f"it speaks version {hello.protocol} of the nodes' protocol, and node 0 version {PROTOCOL}"
            return Message(kind="refused", text=text)
        if hello.run_id != own.run_id and hello.output != own.output:
            # A node of this run with other data or settings publishes to the same place; what differs is found later.
            what = f"it is of run {hello.run_id}, which publishes to {hello.output}"
            return Message(kind="refused", text=f"{what}; node 0 of run {own.run_id}, to {own.output}")
        if not 0 < hello.node < own.nodes:
            text = f"it is node {hello.node} with SFT_PARALLEL__NODES={hello.nodes}, and node 0 has {own.nodes}"
            return Message(kind="refused", text=text)
        if hello.node in self._wires or self._has_met.is_set():
            where = self._wires[hello.node].remote_address if hello.node in self._wires else "another place"
            text = f"node {hello.node} is here already, from {where}; SFT_PARALLEL__NODE_RANK may be given twice"
            return Message(kind="refused", text=text, value="later")  # it may be what a dead one has left
        return None

    async def _serve(self, node: int, wire: Wire) -> None:
        self._wires[node] = wire
        missing = set(range(1, self._node.nodes)) - set(self._wires)
        if missing:
            self._tell_missing(missing)
        else:
            self._has_met.set()
            self._tell(Message(kind="met"))
            self._board.meet(Path(first_address=wire.local_address, own_address=wire.local_address))
        try:
            while True:
                self._take(await wire.receive_message(), node)
        except WIRE_ERRORS as error:
            self._lose(node, explain_loss(error))
        await wire.close(timeout_s=1)

    def _take(self, message: Message, node: int) -> None:
        if message.kind == "value":
            self._gather(message, node)
        elif message.kind == "interrupted":
            self._board.interrupt(node, message.round, message.text)
            self._tell(message)
        elif message.kind == "ended":
            self._left.add(node)
            self._board.fail_by(node, message.text)
            self._tell(message)
        elif message.kind == "done":
            self._left.add(node)

    def _gather(self, message: Message, node: int) -> None:
        given = self._given.setdefault(message.round, {})
        given[node] = message.value
        if len(given) == self._node.nodes:
            values = [given[node] for node in sorted(given)]
            del self._given[message.round]
            self._tell(Message(kind="values", round=message.round, value=values))
            self._board.put_values(message.round, values)

    def _lose(self, node: int, why: str) -> None:
        address = self._wires.pop(node).remote_address
        if not self._has_met.is_set():  # it may come again
            self._tell_missing(set(range(1, self._node.nodes)) - set(self._wires))
        elif node not in self._left:
            text = f"({address}) is lost: {why}"
            self._board.fail_by(node, text)
            self._tell(Message(kind="lost", node=node, text=text))

    def _tell_missing(self, missing: set[int]) -> None:
        self._board.note(missing=missing)
        self._tell(Message(kind="waiting", value=sorted(missing)))

    def _tell(self, message: Message) -> None:
        for node, wire in self._wires.items():
            if node != message.node:
                wire.send(message)


class Leaf:
    """Any other node: it is connected to node 0, and tries again until all have met."""

    def __init__(self, node: Node, hello: Hello, board: Board) -> None:
        self._node = node
        self._hello = hello
        self._board = board
        self._wire: Wire | None = None
        self._is_over = False

    async def run(self) -> None:
        """Connect, again and again, until there is no more use."""
        while not self._is_over:
            reason = await self._connect()
            self._board.note(missing={0}, reason=reason)
            await asyncio.sleep(_PAUSE_S)

    def send(self, message: Message) -> None:
        """Pass on what this node says."""
        if self._wire is not None:
            self._wire.send(message)

    def wires(self) -> list[Wire]:
        """Return the open connection, if there is one."""
        return [] if self._wire is None else [self._wire]

    def is_alone(self) -> bool:
        """Say whether node 0 has said goodbye."""
        return self._wire is None or self._is_over

    async def _connect(self) -> str:
        """Talk to node 0 as long as there is a connection; return why there is none any more."""
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                wire = Wire(*await asyncio.open_connection(self._node.host, self._node.port))
        except OSError as error:
            return "no answer" if isinstance(error, TimeoutError) else str(error)
        wire.send(self._hello)
        self._wire = wire
        try:
            while True:
                self._take(await wire.receive_message(), wire)
        except WIRE_ERRORS as error:
            reason = explain_loss(error)
        finally:
            self._wire = None
            wire.abort()
        if self._board.path is not None and not self._is_over:
            self._is_over = True
            self._board.fail_by(0, f"({wire.remote_address}) is lost: {reason}")
        return reason

    def _take(self, message: Message, wire: Wire) -> None:
        if message.kind == "waiting":
            self._board.note(missing=set(message.value), reason="")
        elif message.kind == "met":
            self._board.meet(Path(first_address=wire.remote_address, own_address=wire.local_address))
        elif message.kind == "values":
            self._board.put_values(message.round, message.value)
        elif message.kind == "interrupted":
            self._board.interrupt(message.node, message.round, message.text)
        elif message.kind in ("ended", "lost"):
            self._is_over = self._is_over or message.node == 0
            self._board.fail_by(message.node, message.text)
        elif message.kind == "done":
            self._is_over = True
            self._board.finish()
        elif message.kind == "refused":
            self._note_refusal(message)

    def _note_refusal(self, message: Message) -> None:
        text = f"node 0 at {self._node.host}:{self._node.port} refused this node: {message.text}"
        if message.value == "later":
            raise ConnectionError(text)
        self._is_over = True
        self._board.fail(ConfigError(text, hint="compare the settings SFT_PARALLEL__* of the two, and the run they do"))
