"""Serves on the unix socket and on the HTTP port, until the context is left."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from agent.errors import ConfigError
from agent.postgres.data_directory import DataDirectory
from agent.server.answers import errors_as_answers, only_peers
from agent.server.http import http_application
from agent.server.unix_socket import bound_socket
from agent.settings import Settings
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AgentStatus, RestoreModeStatus

SHUTDOWN_SECONDS = 5.0  # for answers under way when the agent stops
# The HTTP port is open to whoever reaches it: no connection may keep what the agent needs for WAL.
IDLE_SECONDS = 75.0  # until a connection on which no whole request comes is closed
MOST_CONNECTIONS = 100


@asynccontextmanager
async def serve_socket(
    path: Path, allowed: Callable[[], set[int]], routes: Sequence[web.RouteDef]
) -> AsyncIterator[None]:
    """Serve `routes` on the unix socket at `path` to peers of the `allowed` uids, inside the context."""
    application = web.Application(middlewares=[only_peers(allowed), errors_as_answers()])
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    with bound_socket(path) as listener:
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()


@asynccontextmanager
async def serve_http(
    settings: Settings,
    metrics: Metrics,
    is_started: Callable[[], bool],
    status: Callable[[], AgentStatus | RestoreModeStatus],
) -> AsyncIterator[None]:
    """Serve metrics, health and, of `status`, the page on PITR_HTTP_LISTEN inside the context.

    Whoever has come last is served: beyond `MOST_CONNECTIONS` the oldest is closed, for a probe takes milliseconds, and
    what stays for long waits for nothing.

    Raises:
        ConfigError: The address cannot be bound.
    """
    runner = web.AppRunner(
        http_application(metrics, is_started, status),
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        keepalive_timeout=IDLE_SECONDS,
        lingering_time=0,  # nobody has a body to send
        auto_decompress=False,
    )
    await runner.setup()
    server, loop = runner.server, asyncio.get_running_loop()
    assert server is not None

    def newest() -> asyncio.Protocol:
        loop.call_soon(_make_room, server)  # not yet: several are accepted before the first of them counts
        return server()

    try:
        try:
            listening = await loop.create_server(newest, settings.http_host, settings.http_port)
        except OSError as error:
            raise ConfigError(
                f"PITR_HTTP_LISTEN={settings.http_host}:{settings.http_port} cannot be bound: {error.strerror}",
                hint="Choose a free port.",
            ) from error
        try:
            yield
        finally:
            listening.close()
    finally:
        await runner.cleanup()


def _make_room(server: web.Server) -> None:
    """Close the oldest connections, so that there may be one more."""
    for oldest in server.connections[: 1 - MOST_CONNECTIONS]:
        if oldest.transport is not None:
            oldest.transport.abort()  # to close would wait until all is sent to whoever does not read


def allowed_uids(data_directory: DataDirectory) -> set[int]:
    """Return who may use the socket: root, the agent's own user, and the owner of the data directory."""
    allowed = {0, os.geteuid()}
    with contextlib.suppress(ConfigError):  # not mounted or initialised yet
        allowed.add(data_directory.owner())
    return allowed
