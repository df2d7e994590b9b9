"""The thread that talks to the other nodes while the job runs, and the port at which they come.

Each end sends a beat every two seconds, so that a node that died, hangs or was cut off is noticed by its silence.
"""

import asyncio
import errno
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from job.errors import ConfigError
from job.nodes.board import Board
from job.nodes.wire import BEAT_S, Message, Wire

_FAREWELL_S = {"done": 10.0, "ended": 2.0}  # for the others to have heard it, before the connection goes


class Role(Protocol):
    """One end of the connections; everything runs in the thread's event loop."""

    async def run(self) -> None:
        """Meet and listen, until cancelled."""

    def send(self, message: Message) -> None:
        """Pass on what this node says."""

    def wires(self) -> list[Wire]:
        """Return the open connections."""

    def is_alone(self) -> bool:
        """Say whether all others have said goodbye."""


class Link:
    """The thread in which one end of the connections lives."""

    def __init__(self, make_role: Callable[[], Role], board: Board) -> None:
        self._board = board
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._note_crash)
        self._role = make_role()
        self._thread = threading.Thread(target=self._serve, name="peers", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Pass on what this node says; returns at once."""
        self._loop.call_soon_threadsafe(self._role.send, message)

    def close(self, farewell: Message) -> None:
        """Say how this node ends, wait until the others have heard it, a few seconds at most, and end the thread."""
        timeout_s = _FAREWELL_S[farewell.kind]
        self._loop.call_soon_threadsafe(lambda: self._start(self._leave(farewell, timeout_s)))
        self._thread.join(timeout_s + 3)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._start(self._role.run())
        self._start(self._beat())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # for connections to close in
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        def report(task: "asyncio.Task[None]") -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, Exception):
                self._board.crash(error)

        self._loop.create_task(work).add_done_callback(report)

    def _note_crash(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A network that fails shows in the connections themselves.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._board.crash(error)

    async def _beat(self) -> None:
        while True:
            for wire in self._role.wires():
                wire.send(Message(kind="beat"))
            await asyncio.sleep(BEAT_S)

    async def _leave(self, farewell: Message, timeout_s: float) -> None:
        self._role.send(farewell)
        deadline_s = self._loop.time() + timeout_s
        while not self._role.is_alone() and self._loop.time() < deadline_s:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(wire.close(timeout_s=1) for wire in self._role.wires()))
        self._loop.stop()


def listen(port: int) -> socket.socket:
    """Return a socket that listens at a port on all addresses, IPv6 included where there is any.

    Raises ConfigError when the port can't be had.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"SFT_PARALLEL__PORT={port}: {'in use on this host' if used else error.strerror}",
            hint="choose another port, the same on every node",
        ) from error
