"""Uploads WAL files before PostgreSQL asks for them, and measures the backlog.

PostgreSQL asks for one file at a time and waits for the answer. The files it will ask for next stand in
`archive_status` as `.ready`: they are uploaded meanwhile, so that most calls are answered from memory.
The directory is listed once for each batch, not for each file: an outage leaves tens of thousands there.
"""

import asyncio
import time
from collections import deque

import structlog

from agent.archive.archiver import WalArchiver
from agent.errors import AgentError
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.telemetry.metrics import Metrics

IDLE_SECONDS = 1.0  # how often an idle agent looks for new .ready files that PostgreSQL has not asked for
FAILURE_PAUSE_SECONDS = 5.0  # after a failure: the store's own retries have been used up by then

log = structlog.get_logger()


class LookAhead:
    """Keeps the archiver busy with what is ready. Run it as a service."""

    name = "look-ahead"

    def __init__(self, archiver: WalArchiver, data_directory: DataDirectory, clock: Clock, metrics: Metrics) -> None:
        self._archiver = archiver
        self._data_directory = data_directory
        self._clock = clock
        self._metrics = metrics
        self._failed = False
        self.backlog_files = 0
        self.oldest_ready_seconds = 0.0

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            pending = await asyncio.to_thread(self._scan)
            await self.drain(pending)
            await self._pause()

    async def _pause(self) -> None:
        seconds = FAILURE_PAUSE_SECONDS if self._failed else IDLE_SECONDS
        self._archiver.asked.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._archiver.asked.wait()
        except TimeoutError:
            pass

    def _scan(self) -> deque[str]:
        ready = self._data_directory.ready_files()
        self._archiver.forget_except(set(ready))
        pending = deque(
            name for name in ready if not self._archiver.is_durable(name, self._data_directory.wal_file_state(name))
        )
        since = self._data_directory.ready_since(pending[0]) if pending else None
        # File times are wall-clock times, so their age is, too.
        self.oldest_ready_seconds = max(0.0, time.time() - since) if since is not None else 0.0
        self.backlog_files = len(pending)
        self._metrics.archive_backlog_files.set(self.backlog_files)
        self._metrics.archive_backlog_age.set(self.oldest_ready_seconds)
        return pending

    async def drain(self, pending: deque[str]) -> None:
        """Archive `pending` in order, several at a time; give up the batch at the first failure."""
        self._failed = False
        running: set[asyncio.Future[None]] = set()
        while pending or running:
            while pending and not self._failed and len(running) < self._archiver.concurrency:
                running.add(self._archiver.start(pending.popleft()))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for outcome in done:
                self.backlog_files -= 1
                self._report(outcome)
            self._metrics.archive_backlog_files.set(max(0, self.backlog_files))

    def _report(self, outcome: asyncio.Future[None]) -> None:
        error = None if outcome.cancelled() else outcome.exception()
        if error is None:
            return
        if not self._failed:
            reason = error.one_line() if isinstance(error, AgentError) else repr(error)
            log.warning("wal not archived yet", reason=reason, backlog_files=self.backlog_files + 1)
        self._failed = True
