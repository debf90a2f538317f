"""A real unix socket server that answers the hook's requests as a test tells it to."""

import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

Reply: TypeAlias = bytes | Callable[[socket.socket], None]

_REQUEST_END = b"\r\n\r\n"
_DEADLINE = re.compile(rb"\r\nPitr-Deadline: (\d+)\r\n")


def reply(status: int, body: bytes = b"", *, wal_file: str | None = None, **headers: str) -> bytes:
    """Return an HTTP reply with its Content-Length; in names of `headers` an underscore stands for a dash."""
    lines = [f"HTTP/1.1 {status} Whatever"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if wal_file is not None:
        lines.append(f"Pitr-Wal-File: {wal_file}")
    if not any(name.lower() in ("content_length", "transfer_encoding") for name in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def stall(connection: socket.socket) -> None:
    """Answer nothing until the hook hangs up."""
    while connection.recv(4096):
        pass


class ScriptedAgent:
    """Gives each connection the next of `replies`, then closes it; the last one is repeated.

    `requests` holds the bytes of each request, in order; `asked` is set by the first; `path` is its socket.
    """

    def __init__(self, socket_path: Path, *replies: Reply) -> None:
        self.requests: list[bytes] = []
        self.asked = threading.Event()
        self.path = socket_path
        self._replies = replies
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="scripted agent")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def deadlines(self) -> list[int]:
        """Return the Pitr-Deadline of each request, in seconds."""
        return [int(_DEADLINE.findall(request)[0]) for request in self.requests]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while not request.endswith(_REQUEST_END):
            received = connection.recv(4096)
            if not received:
                return
            request += received
        number = len(self.requests)
        self.requests.append(request)
        self.asked.set()
        answer = self._replies[min(number, len(self._replies) - 1)]
        try:
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the hook has heard enough
