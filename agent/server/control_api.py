"""What `pitr` asks of the running agent: to take a backup, and how it is."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from agent.domain.catalog import Backup
from agent.errors import AgentError, BackupFailed, ConfigError
from agent.telemetry.progress import Progress, ReportProgress

BACKUPS_PATH = "/v1/backups"
STATUS_PATH = "/v1/status"
PROGRESS_SECONDS = 0.2  # at most so often is progress told

log = structlog.get_logger()

TakeBackup = Callable[[ReportProgress], Awaitable[Backup]]


class ControlApi:
    """The routes that the `pitr` command calls. `take_backup` is None where no backup can be taken (restore mode)."""

    def __init__(self, take_backup: TakeBackup | None, status: Callable[[], dict[str, Any]]) -> None:
        self._running: set[asyncio.Task[Backup]] = set()
        self._take_backup = take_backup
        self._status = status

    def routes(self) -> list[web.RouteDef]:
        """Return the routes to add to the application on the socket."""
        return [web.post(BACKUPS_PATH, self.backup), web.get(STATUS_PATH, self.status)]

    async def status(self, _request: web.Request) -> web.Response:
        """Answer with the agent's state as one JSON object."""
        return web.json_response(self._status())

    async def backup(self, request: web.Request) -> web.StreamResponse:
        """Take a base backup; answer with JSON lines: progress, and last either its name or the error.

        A caller that goes away cancels the backup: nobody would learn how it ended.
        """
        if self._take_backup is None:
            raise ConfigError("this agent restores; it takes no backups", hint="Ask the agent of the primary.")
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        latest = Progress("starting")

        def report(progress: Progress) -> None:
            nonlocal latest
            latest = progress

        async def tell(**values: object) -> None:
            await answer.write(json.dumps(values).encode() + b"\n")

        async def backup() -> Backup:
            assert self._take_backup is not None
            return await self._take_backup(report)

        work = asyncio.create_task(backup(), name="base backup on request")
        self._running.add(work)
        try:
            while not work.done():
                await tell(stage=latest.stage, done_bytes=latest.done, total_bytes=latest.total)
                await asyncio.wait([work], timeout=PROGRESS_SECONDS)
            if work.cancelled():
                raise BackupFailed(
                    "the base backup was given up: the agent is stopping", hint="Take another when it runs again."
                )
            result = work.result()
            await tell(backup=result.name, size_bytes=result.size_bytes, stored_bytes=result.stored_bytes)
        except AgentError as error:
            log.warning("base backup failed", reason=error.one_line())
            await tell(error=error.message, hint=error.hint, exit_code=error.exit_code)
        finally:
            work.cancel()
            await asyncio.wait([work])
            self._running.discard(work)
        return answer

    async def close(self) -> None:
        """Give up the backups that run, and return when nothing is left of them. Before the repository is closed."""
        for work in self._running:
            work.cancel()
        if self._running:
            await asyncio.wait(self._running)
