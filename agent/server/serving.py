"""Serves on the unix socket and on the HTTP port, until the context is left."""

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

    Raises:
        ConfigError: The address cannot be bound.
    """
    runner = web.AppRunner(http_application(metrics, is_started, status), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.http_host, settings.http_port).start()
        except OSError as error:
            raise ConfigError(
                f"PITR_HTTP_LISTEN={settings.http_host}:{settings.http_port} cannot be bound: {error.strerror}",
                hint="Choose a free port.",
            ) from error
        yield
    finally:
        await runner.cleanup()


def allowed_uids(data_directory: DataDirectory) -> set[int]:
    """Return who may use the socket: root, the agent's own user, and the owner of the data directory."""
    allowed = {0, os.geteuid()}
    with contextlib.suppress(ConfigError):  # not mounted or initialised yet
        allowed.add(data_directory.owner())
    return allowed
