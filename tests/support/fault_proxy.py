"""A proxy between the agent and S3 that makes the network and the store misbehave, request by request.

It understands just enough HTTP/1.1: messages with a `Content-Length` and chunked answers. Requests are passed on as
they are, so their signatures stay valid; names and values of headers are not checked.
"""

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit

from agent.lab.seaweedfs import free_ports


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path (with query, decoded) match.

    Of the actions that are set:

    delay_seconds: Wait before the request is passed on.
    black_hole: Take the request and never answer.
    status, code: Answer this status, the store is not asked: `answer_body`, or an S3 error document with this code.
    drop_request: Close the connection without passing the request on.
    strip_header: Leave this header out of the request that is passed on.
    flip_sent_byte: Invert the byte at this offset of the request's body.
    drop_answer: Pass the request on, wait for the answer, and close the connection without giving it.
    answer_body: Replace the body of the store's answer.
    flip_byte: Invert the byte at this offset of the answer's body.
    cut_after: Close the connection after so many bytes of the answer's body; its Content-Length stays.
    reset: Close with a reset (RST) rather than in order (FIN), wherever this fault closes.
    """

    method: str = ".*"
    path: str = ".*"
    times: int = 1
    delay_seconds: float = 0
    black_hole: bool = False
    status: int | None = None
    code: str = "InternalError"
    drop_request: bool = False
    strip_header: str | None = None
    flip_sent_byte: int | None = None
    drop_answer: bool = False
    answer_body: bytes | None = None
    flip_byte: int | None = None
    cut_after: int | None = None
    reset: bool = False

    def matches(self, method: str, path: str) -> bool:
        """Tell whether this fault is for that request."""
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


@dataclass
class Message:
    """A request or an answer: its first line and headers as they came, each with its line end, and its body."""

    head: bytes
    body: bytes = b""

    @property
    def first_line(self) -> str:
        """The request line or the status line."""
        return self.head.partition(b"\r\n")[0].decode("latin-1")

    @property
    def is_head(self) -> bool:
        """Whether this is a HEAD request, whose answer has no body."""
        return self.head.startswith(b"HEAD ")

    def header(self, name: str) -> str | None:
        """Return the header's value, None if there is none."""
        found = re.search(rf"(?im)^{name}:([^\r\n]*)".encode(), self.head)
        return found[1].decode("latin-1").strip() if found else None

    def set_header(self, name: str, value: str) -> None:
        """Give the header this value, in place of those it has."""
        self.drop_header(name)
        self.head += f"{name}: {value}\r\n".encode("latin-1")

    def drop_header(self, name: str) -> None:
        """Leave the header out."""
        self.head = re.sub(rf"(?im)^{name}:[^\r\n]*\r\n".encode(), b"", self.head)

    def replace_body(self, body: bytes) -> None:
        """Put `body` in place of the body."""
        self.drop_header("Content-Length")
        self.drop_header("Transfer-Encoding")
        self.head += b"Content-Length: %d\r\n" % len(body)
        self.body = body


def refusal(request: Message, status: int, code: str, body: bytes | None = None) -> Message:
    """Return the store's answer of this status: `body`, or an S3 error document with this code."""
    document = f"<Error><Code>{code}</Code><Message>made by a test</Message></Error>".encode()
    answer = Message(f"HTTP/1.1 {status} Fault\r\n".encode())
    answer.replace_body(b"" if request.is_head else body or document)
    return answer


@dataclass
class FaultProxy:
    """Listens on loopback in front of `upstream` (a URL); `add` faults, read `requests`. An async context manager.

    guards: asked about every request that is passed on; the first answer they give is given instead of the store's. A
        guard may change the request.
    met: how many requests met a fault.
    """

    upstream: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    guards: list[Callable[[Message], Message | None]] = field(default_factory=list)
    met: int = 0

    def __post_init__(self) -> None:
        self._faults: list[Fault] = []
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._port = free_ports(1)[0]  # none that the kernel gives to somebody's connection while this is stopped

    @property
    def endpoint(self) -> str:
        """URL of the proxy."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, after `stop` on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def stop(self) -> None:
        """Refuse connections and cut those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.cut()

    async def cut(self) -> None:
        """Cut the connections that are open; new ones are served."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def add(self, *faults: Fault) -> None:
        """Let these happen, the first that matches a request at a time."""
        self._faults += faults

    def clear(self) -> None:
        """Let nothing more happen."""
        self._faults.clear()

    def pending(self) -> list[Fault]:
        """Return the faults that are yet to happen."""
        return [fault for fault in self._faults if fault.times > 0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handle one request; return False to close the connection."""
        request = await _read_message(reader)
        method, target, _ = request.first_line.split(" ")
        path = unquote(target)
        self.requests.append((method, path))
        fault = next((fault for fault in self._faults if fault.matches(method, path)), None)
        self.met += fault is not None
        fault = fault or Fault()
        fault.times -= 1
        await asyncio.sleep(fault.delay_seconds)
        if fault.black_hole:
            await reader.read()
            return False
        if fault.drop_request:
            return _close(writer, fault)
        answer = await self._answer(request, fault)
        if fault.drop_answer:
            return _close(writer, fault)
        body = answer.body if fault.flip_byte is None else _flipped(answer.body, fault.flip_byte)
        writer.write(answer.head + b"\r\n" + body[: fault.cut_after])
        await writer.drain()
        return True if fault.cut_after is None else _close(writer, fault)

    async def _answer(self, request: Message, fault: Fault) -> Message:
        if fault.status is not None:
            return refusal(request, fault.status, fault.code, fault.answer_body)
        for guard in self.guards:
            if (refused := guard(request)) is not None:
                return refused
        if fault.strip_header is not None:
            request.drop_header(fault.strip_header)
        if fault.flip_sent_byte is not None:
            request.body = _flipped(request.body, fault.flip_sent_byte)
        url = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            writer.write(request.head + b"\r\n" + request.body)
            await writer.drain()
            answer = await _read_message(reader, bodiless=request.is_head)
        finally:
            writer.transport.abort()  # closed, it would wait until all is sent, after its loop
            with suppress(ConnectionError):
                await writer.wait_closed()
        if fault.answer_body is not None:
            answer.replace_body(fault.answer_body)
        return answer


def _flipped(body: bytes, offset: int) -> bytes:
    return body[:offset] + bytes([body[offset] ^ 0xFF]) + body[offset + 1 :]


async def _read_message(reader: asyncio.StreamReader, *, bodiless: bool = False) -> Message:
    message = Message((await reader.readuntil(b"\r\n\r\n"))[:-2])
    if bodiless:
        return message
    if (message.header("Transfer-Encoding") or "").lower() == "chunked":
        message.replace_body(await _read_chunks(reader))
    else:
        message.body = await reader.readexactly(int(message.header("Content-Length") or 0))
    return message


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return bytes(body)


def _close(writer: asyncio.StreamWriter, fault: Fault) -> bool:
    """Close the connection as the fault says; return False."""
    if fault.reset:
        linger_not = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        writer.transport.abort()
    return False
