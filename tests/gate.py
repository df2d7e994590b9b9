"""A gate before an S3 server: at the first request that matches, a test can do something before it goes on, or answer
requests itself from then on."""

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

_ERROR = """HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\
Connection: close\r\n\r\n{body}"""


def refusal(status: int, code: str) -> bytes:
    """Return an answer as S3 gives it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>refused</Message></Error>'
    return _ERROR.format(status=status, length=len(body), body=body).encode()


class Gate:
    """Listens at `endpoint`. `act` is done once, when the head of a request matches; `answer`, if given, is asked from
    then on for the answer to each request's head, and returns None to let it pass."""

    def __init__(
        self,
        upstream: str,
        pattern: str,
        *,
        act: Callable[[], object] = lambda: None,
        answer: Callable[[str], bytes | None] = lambda head: None,
    ) -> None:
        self.is_open = threading.Event()
        self._upstream = ("127.0.0.1", int(upstream.rsplit(":", 1)[1]))
        self._pattern = re.compile(pattern)
        self._act = act
        self._answer = answer
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(65536)
                if not piece:
                    return
                head += piece
            with self._lock:
                if not self.is_open.is_set() and self._pattern.search(head.decode("latin-1")):
                    self._act()
                    self.is_open.set()
            answer = self._answer(head.decode("latin-1")) if self.is_open.is_set() else None
            if answer is not None:
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):  # or the client finds the connection reset, in place of the answer
                    pass
                return
            self._pass_on(client, head)

    def _pass_on(self, client: socket.socket, head: bytes) -> None:
        with socket.create_connection(self._upstream) as server:
            # One request a connection, so that no head is overlooked.
            server.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            _pump(server, client)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
