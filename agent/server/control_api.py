"""What `pitr` asks of the running agent: to take a backup, to cancel it, and how it is."""

import json
from collections.abc import Callable
from typing import Any

import structlog
from aiohttp import web

from agent.backup.order import BackupOrder
from agent.backup.runner import BackupRun, BackupRunner
from agent.domain.delta_parent import BackupKind
from agent.errors import AgentError, ConfigError
from agent.server.control_paths import BACKUPS_PATH, CANCEL_PATH, STATUS_PATH
from agent.telemetry.status import AgentStatus, as_json

PROGRESS_SECONDS = 0.5  # how often progress is told

log = structlog.get_logger()


class ControlApi:
    """The routes that the `pitr` command calls."""

    def __init__(self, backups: BackupRunner, status: Callable[[], AgentStatus]) -> None:
        self._backups = backups
        self._status = status

    def routes(self) -> list[web.RouteDef]:
        """Return the routes to add to the application on the socket."""
        return [
            web.post(BACKUPS_PATH, self.backup),
            web.post(CANCEL_PATH, self.cancel),
            web.get(STATUS_PATH, self.status),
        ]

    async def status(self, _request: web.Request) -> web.Response:
        """Answer with the agent's state as one JSON object."""
        return web.json_response(as_json(self._status()))

    async def cancel(self, _request: web.Request) -> web.Response:
        """Give up the base backup that runs; answer, when nothing is left of it, whether there was one."""
        return web.json_response({"cancelled": await self._backups.cancel()})

    async def backup(self, request: web.Request) -> web.StreamResponse:
        """Begin a base backup, or join the one that runs; answer with JSON lines, the last telling how it ended.

        The first line says `joined`, the next ones are of the fields of `RunningBackup`, the last one has the name as
        `backup`, or an `error`. The backup goes on when the caller goes away.
        """
        order = _order(request)
        joined = self._backups.running is not None
        run = self._backups.start(order)
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        await _write(answer, {"joined": joined, "why": run.order.why, "permanent": run.order.permanent})
        while not await run.ended(PROGRESS_SECONDS):
            await _write(answer, as_json(run.status()))
        await _write(answer, _outcome(run))
        return answer


async def _write(answer: web.StreamResponse, values: dict[str, Any]) -> None:
    await answer.write(json.dumps(values).encode() + b"\n")


def _order(request: web.Request) -> BackupOrder:
    kind, permanent = request.query.get("kind", BackupKind.AUTO), request.query.get("permanent", "false")
    if kind not in list(BackupKind) or permanent not in ("true", "false"):
        raise ConfigError(f"no base backup is of kind={kind} permanent={permanent}")
    return BackupOrder(kind=BackupKind(kind), permanent=permanent == "true")


def _outcome(run: BackupRun) -> dict[str, Any]:
    try:
        backup = run.result()
    except AgentError as error:
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if backup is None:
        return {"error": "the base backup was not needed any more: another agent took one", "hint": "", "exit_code": 50}
    return {
        "backup": backup.name,
        "kind": BackupKind.DELTA if backup.is_delta else BackupKind.FULL,
        "permanent": backup.permanent,
        "corrupt_pages": backup.corrupt_pages,
        "seconds": run.status().seconds,
        "size_bytes": backup.size_bytes,
        "stored_bytes": backup.stored_bytes,
    }
