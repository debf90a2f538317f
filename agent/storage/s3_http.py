"""How S3 requests travel: the HTTP session that aiobotocore uses in place of its own.

It differs in what matters to large bodies and to operators: a body is sent in slices, without a copy, and the loop runs
in between; a redirect is an answer and never followed, so that no request goes to a host nobody named; dead connections
are noticed by the kernel (keepalive, unacknowledged data); errors of the network arrive as they are.
"""

import errno
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.awsrequest import AioAWSResponse
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict
from yarl import URL

_SLICE_BYTES = 256 << 10
_READ_BUFFER_BYTES = 512 << 10
_KEEPALIVE_SECONDS = 15
_DEAD_AFTER_SECONDS = 60


class _SlicedBody(aiohttp.Payload):
    """Bytes in memory, written slice by slice as the connection takes them."""

    def __init__(self, body: bytes | bytearray) -> None:
        super().__init__(body)
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        view = memoryview(self._value)
        for start in range(0, len(view), _SLICE_BYTES):
            await writer.write(view[start : start + _SLICE_BYTES])

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        # botocore states the length of the very bytes it hands over.
        assert content_length in (None, self._size)
        await self.write(writer)


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    """Open a socket that notices a peer which went away without a word."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family=family, type=kind, proto=protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_AFTER_SECONDS)
    return opened


class S3HttpSession:
    """The session, with the signature that aiobotocore expects of its `http_session_cls`."""

    def __init__(
        self,
        *,
        timeout: tuple[float, float],
        proxies: Mapping[str, str] | None = None,
        verify: bool | str | None = None,
        **_unused: object,
    ) -> None:
        """Take what the client's configuration says; nothing is opened before the first request.

        Args:
            timeout: Seconds to connect, and between two reads.
            proxies: Proxy URL by scheme of the request.
            verify: File of trusted certificates, else the system's.
        """
        self._timeout = aiohttp.ClientTimeout(sock_connect=timeout[0], sock_read=timeout[1])
        self._proxies = dict(proxies or {})
        self._ca_file = verify if isinstance(verify, str) else None
        self._session: aiohttp.ClientSession | None = None
        self._trust: ssl.SSLContext | None = None
        self._trusted: tuple[int, int] | None = None  # the CA file's inode and time of change

    async def __aenter__(self) -> "S3HttpSession":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            if self._ca_file is not None:
                self._trust, self._trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), None  # trusts nobody yet
                self._trusts_a_new_file(self._ca_file, self._trust)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # as many as are asked for: the request's time goes by while it waits for one
                    ssl=self._trust or True,
                    socket_factory=_open_socket,
                ),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("Content-Type",),  # it would not be among the signed headers
                auto_decompress=False,
                read_bufsize=_READ_BUFFER_BYTES,
            )
        return self._session

    async def send(self, request: Any) -> AioAWSResponse:  # botocore's AWSPreparedRequest, untyped
        """Send a signed request; return the answer, its body read unless the operation streams it.

        Raises:
            aiohttp.ClientError, OSError: The network's or the server's fault.
        """
        headers = CIMultiDict(
            (name, value.decode() if isinstance(value, bytes) else value) for name, value in request.headers.items()
        )
        headers["Accept-Encoding"] = "identity"  # what is stored is what we want, byte for byte
        try:
            response = await self._answered(request, headers)
        except aiohttp.ClientConnectorCertificateError:
            if self._ca_file is None or self._trust is None or not self._trusts_a_new_file(self._ca_file, self._trust):
                raise
            response = await self._answered(request, headers)
        answer = AioAWSResponse(
            str(response.url),
            response.status,
            {name.decode().lower(): value.decode() for name, value in response.raw_headers},
            response,
        )
        if not request.stream_output:
            await answer.content
        return answer

    async def _answered(self, request: Any, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        return await self._opened().request(
            request.method,
            URL(request.url, encoded=True),
            headers=headers,
            data=_SlicedBody(request.body) if request.body else None,
            proxy=self._proxies.get(urlsplit(request.url).scheme),
            allow_redirects=False,
        )

    def _trusts_a_new_file(self, ca_file: str, trust: ssl.SSLContext) -> bool:
        """Trust what the CA file holds, unless it is the one that was read last; tell whether it was read.

        What was trusted before stays trusted until this process ends.
        """
        status = Path(ca_file).stat()
        is_new = self._trusted != (status.st_ino, status.st_mtime_ns)
        if is_new:
            try:
                trust.load_verify_locations(ca_file)
            except ssl.SSLError as error:
                raise OSError(errno.EINVAL, "it holds no certificates", ca_file) from error
            self._trusted = status.st_ino, status.st_mtime_ns
        return is_new
