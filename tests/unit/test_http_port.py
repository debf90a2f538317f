"""The HTTP port is open to whoever reaches it: it changes nothing, and nobody takes it, or the log, from the others."""

import asyncio
import io
import json
import select
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial

import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry

from agent.lab.seaweedfs import free_ports
from agent.server import serving, status_page
from agent.settings import load_settings
from agent.telemetry.metrics import Metrics
from tests.support.statuses import healthy
from tests.support.until import until

PATHS = ["/", "/metrics", "/status.json", "/healthz", "/readyz", "/startupz"]
HALF_A_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: p"


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """Yield the port on loopback that the agent's page is served on."""
    (port,) = free_ports(1)
    settings = load_settings({"WALG_FILE_PREFIX": "/backups", "PITR_HTTP_LISTEN": f"127.0.0.1:{port}"})
    async with serving.serve_http(settings, Metrics(CollectorRegistry()), lambda: True, healthy):
        yield port


def connected(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    client.sendall(sent)
    return client


def is_hung_up(client: socket.socket) -> bool:
    """Tell whether the agent has ended the connection; nothing is read."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


async def ask_and_never_read(client: socket.socket) -> None:
    """Return when the agent waits for the client to read."""
    with suppress(BlockingIOError):
        while True:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: pitr\r\n\r\n" * 1000)
            await asyncio.sleep(0.01)


async def status_of(port: int, path: str = "/healthz", method: str = "GET") -> int:
    async with ClientSession() as session, session.request(method, f"http://127.0.0.1:{port}{path}") as answer:
        await answer.read()
        return answer.status


async def test_nothing_can_be_done_but_to_read() -> None:
    async with served() as port:
        for path in PATHS:
            assert [await status_of(port, path, method) for method in ("GET", "HEAD")] == [200, 200]
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
                assert await status_of(port, path, method) == 405, (method, path)
        for path in ("/v1/status", "/v1/backups", f"/v1/wal/{24 * '0'}", "/../etc/passwd", "/pages/base.html"):
            assert await status_of(port, path) == 404
            assert await status_of(port, path, "POST") == 404


async def test_a_connection_on_which_no_whole_request_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.2)
    async with served() as port:
        for sent in (b"", HALF_A_REQUEST):
            with connected(port, sent) as client:
                await until(partial(is_hung_up, client), what="the connection to be closed")


async def test_who_comes_last_is_served_however_many_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 5)
    async with served() as port:
        with ExitStack() as stack:
            greedy = stack.enter_context(connected(port))
            await ask_and_never_read(greedy)
            patient = [stack.enter_context(connected(port, HALF_A_REQUEST)) for _ in range(6)]
            await until(partial(is_hung_up, greedy), what="the agent to give up whoever does not read")
            await until(partial(is_hung_up, patient[0]), what="the oldest connection to be closed")
            assert await status_of(port) == 200
            assert not is_hung_up(patient[-1])


async def test_who_does_not_read_does_not_hold_up_the_end() -> None:
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(served())
        with connected(port) as greedy:
            await ask_and_never_read(greedy)
            async with asyncio.timeout(45):  # aiohttp alone would wait twice a minute
                await stack.aclose()


async def test_whoever_sends_what_is_no_request_fills_no_log(log_stream: io.StringIO) -> None:
    async with served() as port:
        for number in range(50):
            with connected(port, b"GET /%d HTTP/1.1\r\nno header\r\n\r\n" % number) as client:
                await until(partial(is_hung_up, client), what="the answer that it is no request")
            assert await status_of(port, "/not/there") == 404
    assert len(log_stream.getvalue().splitlines()) == 1


async def test_a_page_whose_library_is_missing_is_told_in_a_line_and_takes_nothing_else_away(
    monkeypatch: pytest.MonkeyPatch, log_stream: io.StringIO
) -> None:
    status_page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    async with served() as port, ClientSession(f"http://127.0.0.1:{port}") as session:
        for _ in range(3):
            async with session.get("/") as answer:
                assert answer.status == 500
                told = await answer.text()
        assert await status_of(port, "/metrics") == 200
    assert told.startswith("the Python package jinja2 cannot be imported: ")
    assert told.endswith("Install postgres-pitr again, with all that it depends on.\n")
    (line,) = log_stream.getvalue().splitlines()
    assert json.loads(line)["reason"] == told.strip()
    assert "exception" not in json.loads(line)
