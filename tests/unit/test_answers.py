"""Who may ask on the socket, and what may be asked for."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import structlog
from aiohttp import web
from yarl import URL

from agent.server.answers import errors_as_answers, only_peers
from agent.server.hook_api import HOOK_PATH_PREFIX, wal_file_of
from tests.support.until import until

NAMES = ["000000010000000000000001", "00000002.history", "000000010000000000000001.partial"]


@asynccontextmanager
async def served(path: Path, allowed: Callable[[], set[int]], asked: list[str]) -> AsyncIterator[aiohttp.ClientSession]:
    """A session to an application on the socket `path` that notes which WAL files it was asked for."""

    async def note(request: web.Request) -> web.Response:
        asked.append(wal_file_of(request))
        return web.Response()

    async def go_on(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b"and on")

    application = web.Application(middlewares=[only_peers(allowed), errors_as_answers()])
    application.add_routes([web.post(HOOK_PATH_PREFIX + "{name}", note), web.get("/endless", go_on)])
    runner = web.AppRunner(application)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        await runner.setup()
        await web.SockSite(runner, listener).start()
        try:
            async with aiohttp.ClientSession("http://pitr", connector=aiohttp.UnixConnector(str(path))) as session:
                yield session
        finally:
            await runner.cleanup()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path: a test's directory is too long for a socket."""
    monkeypatch.chdir(tmp_path)
    return Path("agent.sock")


async def test_a_peer_of_another_uid_is_refused_before_anything_is_done(path: Path) -> None:
    asked: list[str] = []
    allowed = {os.geteuid() + 1}
    async with served(path, lambda: allowed, asked) as session:
        async with session.post(HOOK_PATH_PREFIX + NAMES[0]) as answer:
            assert answer.status == 403
            assert f"uid {os.geteuid()} may not use this socket" in await answer.text()
        assert asked == []
        allowed.add(os.geteuid())  # PGDATA's owner may become known while the agent runs
        async with session.post(HOOK_PATH_PREFIX + NAMES[0]) as answer:
            assert answer.status == 200
    assert asked == NAMES[:1]


@pytest.mark.parametrize(
    "hostile",
    [
        "..%2f..%2fetc%2fshadow",
        "%2fetc%2fshadow",
        "..%2F000000010000000000000001",
        "000000010000000000000001%00",
        "000000010000000000000001%0a",
        "000000010000000000000001%2f",
        "000000010000000000000001.ready",
        "pitr.spool",
        ".",
        "%2e%2e",
        "00000001000000000000000%CC%81",
    ],
)
async def test_only_the_name_of_a_wal_file_comes_through(path: Path, hostile: str) -> None:
    asked: list[str] = []
    async with served(path, lambda: {os.geteuid()}, asked) as session:
        async with session.post(URL(HOOK_PATH_PREFIX + hostile, encoded=True)) as answer:
            assert answer.status in (400, 404)
        for name in NAMES:
            async with session.post(HOOK_PATH_PREFIX + name) as answer:
                assert answer.status == 200
    assert asked == NAMES


async def test_what_is_refused_and_what_fails_again_and_again_is_logged_once(path: Path) -> None:
    allowed: set[int] = set()
    with structlog.testing.capture_logs() as lines:
        async with served(path, lambda: allowed, []) as session:
            for status in (403, 400):
                for _ in range(20):
                    async with session.post(HOOK_PATH_PREFIX + "no name") as answer:
                        assert answer.status == status
                allowed.add(os.geteuid())
    assert [line["event"] for line in lines] == ["peer refused", "request failed"]


async def test_a_caller_that_goes_away_is_no_error_of_the_agent(path: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(path, lambda: {os.geteuid()}, []) as session:
            async with session.get("/endless") as answer:
                assert await answer.content.readexactly(6) == b"and on"
                answer.close()
            await until(lambda: bool(lines))
    assert [(line["event"], line["log_level"]) for line in lines] == [("caller went away", "info")]
