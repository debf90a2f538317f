"""The end of the agent: it outlives PostgreSQL, whose last WAL still has to be archived.

Kubernetes tells a native sidecar to end after the main containers have ended, and a plain container at the same moment
as PostgreSQL's. It also tells an agent that alone is replaced, while PostgreSQL runs on: that one has nothing to wait
for, its successor goes on, and the hooks wait for it. PostgreSQL itself says which it is: one that stops writes so into
postmaster.pid at once.
"""

import asyncio

import structlog

from agent.archive.archiver import WalArchiver
from agent.archive.look_ahead import LookAhead
from agent.errors import WalNotArchived
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory

SIGN_SECONDS = 3.0  # how long a PostgreSQL that is told to end at the same time may take to say that it stops
POLL_SECONDS = 0.2
MOST_NAMES = 10  # of WAL files in one line of the log

log = structlog.get_logger()


class Drain:
    """Ends the agent when it was asked to: at once beside a running server, else when all WAL is archived.

    Run it as a service. `asked` is set from outside; it sets `stop`. `problem` is set if WAL had to be left behind.
    """

    name = "drain"

    def __init__(
        self,
        asked: asyncio.Event,
        stop: asyncio.Event,
        archiver: WalArchiver,
        look_ahead: LookAhead,
        data_directory: DataDirectory,
        clock: Clock,
        *,
        timeout_seconds: float,
    ) -> None:
        self.problem: WalNotArchived | None = None
        self._asked = asked
        self._stop = stop
        self._archiver = archiver
        self._look_ahead = look_ahead
        self._data_directory = data_directory
        self._clock = clock
        self._timeout_seconds = timeout_seconds

    async def run(self) -> None:
        """Wait until asked, drain, and set `stop`."""
        await self._asked.wait()
        await self._drain()
        self._stop.set()
        await asyncio.Event().wait()

    async def _drain(self) -> None:
        started = self._clock.monotonic()
        files, content_bytes = self._archiver.archived_files, self._archiver.archived_bytes
        log.info("drain started", backlog_files=self._look_ahead.backlog_files, timeout_seconds=self._timeout_seconds)
        tell, outcome = log.info, "drained"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if await self._server_ends():
                    await self._look_ahead.settle()
                else:
                    outcome = "server goes on without the agent"
        except TimeoutError:
            tell, outcome = log.error, "drain given up"
            self.problem = await self._not_archived()
        tell(
            outcome,
            files=self._archiver.archived_files - files,
            bytes=self._archiver.archived_bytes - content_bytes,
            seconds=round(self._clock.monotonic() - started, 3),
            backlog_files=self._look_ahead.backlog_files,
            backlog_first=list(self._look_ahead.backlog)[:MOST_NAMES],
        )

    async def _not_archived(self) -> WalNotArchived:
        left = list(self._look_ahead.backlog)
        runs = "" if await asyncio.to_thread(self._data_directory.is_server_gone) else "PostgreSQL still runs, and "
        which = f", from {left[0]} on" if left else ""
        return WalNotArchived(
            f"after {self._timeout_seconds:g} s {runs}{len(left)} WAL files are not archived{which}",
            hint="Keep the volume: they are archived when PostgreSQL and the agent run on it again.",
        )

    async def _server_ends(self) -> bool:
        """Return True when no server runs, False if one does that is not stopping."""
        sign_until = self._clock.monotonic() + SIGN_SECONDS
        while not await asyncio.to_thread(self._data_directory.is_server_gone):
            status = await asyncio.to_thread(self._data_directory.postmaster_status)
            if status not in (None, "stopping") and self._clock.monotonic() > sign_until:
                return False
            await self._clock.sleep(POLL_SECONDS)
        return True
