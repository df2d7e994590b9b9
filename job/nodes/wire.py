"""What nodes say to each other, and how it goes over a connection: JSON behind its length in 4 bytes.

Nothing is ever unpickled, and no secret is sent. Whoever reaches the port could take part, as with torch's own
rendezvous: it belongs into a network that is trusted, and a stranger's bytes do no harm.
"""

import asyncio
import struct
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

PROTOCOL = 1
HELLO_LIMIT_BYTES = 16_384
MESSAGE_LIMIT_BYTES = 64 * 2**20
BEAT_S = 2.0
SILENT_S = 20.0  # after so long without a beat, a node is lost
_LENGTH = struct.Struct("!I")

# Whatever a broken, silent or foreign connection leads to; pydantic's ValidationError is a ValueError.
WIRE_ERRORS = (OSError, EOFError, ValueError, RecursionError)


class Hello(BaseModel):
    """The first words of a node: who it is, and the run that it comes for, which publishes to `output`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    protocol: int
    node: int
    nodes: int
    run_id: str
    output: str


class Message(BaseModel):
    """Everything after that. `node` is whom it is about, `round` counts the exchanges before it.

    - met: all are here; waiting: `value` lists the nodes that aren't
    - refused: node 0 doesn't want this node, because of `text`; `value` says whether it may come again
    - beat: still here
    - value: what a node gives to an exchange; values: what all gave
    - interrupted: a node's attempt at training has ended, and so must those of the others
    - ended: a node has failed; lost: it is out of reach, both as `text` says; done: it has ended well
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["met", "waiting", "refused", "beat", "value", "values", "interrupted", "ended", "lost", "done"]
    node: int = 0
    round: int = 0
    value: Any = None
    text: str = ""


class Wire:
    """One connection to another node."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Hello | Message) -> None:
        """Queue a message; a connection that is broken drops it, which its reader notices."""
        payload = message.model_dump_json().encode()
        self._writer.write(_LENGTH.pack(len(payload)) + payload)

    async def receive(self, *, limit_bytes: int, timeout_s: float) -> bytes:
        """Return the next message, not parsed.

        Raises one of WIRE_ERRORS: TimeoutError when none has come in time, EOFError at the end of the connection,
        ValueError for one that is longer than the limit.
        """
        async with asyncio.timeout(timeout_s):
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > limit_bytes:
                raise ValueError(f"a message of {length} bytes")
            return await self._reader.readexactly(length)

    async def receive_message(self) -> Message:
        """Return the next message within the time after which a node counts as lost."""
        return Message.model_validate_json(await self.receive(limit_bytes=MESSAGE_LIMIT_BYTES, timeout_s=SILENT_S))

    @property
    def local_address(self) -> str:
        """The IP address of this end."""
        return _normalise(self._writer.get_extra_info("sockname")[0])

    @property
    def remote_address(self) -> str:
        """The IP address of the other end."""
        return _normalise(self._writer.get_extra_info("peername")[0])

    async def close(self, *, timeout_s: float) -> None:
        """Send what is queued and close; what can't be sent in time is dropped."""
        self._writer.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.wait_closed()
        except OSError:  # it was broken already, or (TimeoutError) takes nothing any more
            self._writer.transport.abort()

    def abort(self) -> None:
        """Drop the connection, with what is queued; nothing happens where it is closed."""
        self._writer.transport.abort()


def explain_loss(error: BaseException) -> str:
    """Say in words how a connection ended that raised one of WIRE_ERRORS."""
    if isinstance(error, TimeoutError):
        return f"nothing was heard from it for {SILENT_S:g} s"
    if isinstance(error, OSError):
        return f"the connection broke: {error}"
    if isinstance(error, EOFError):
        return "it closed the connection without a word"
    return "it sent what no node sends"


def _normalise(address: str) -> str:
    return address.removeprefix("::ffff:")  # an IPv4 address, on a socket that serves both
