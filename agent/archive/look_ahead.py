"""Uploads WAL files before PostgreSQL asks for them, and measures the backlog.

PostgreSQL asks for one file at a time and waits for the answer. The files it will ask for next stand in
`archive_status` as `.ready`: they are uploaded meanwhile, so that most calls are answered from memory.
The directory is listed once for each batch, and again every half a minute while a long one is worked off, not for each
file: an outage leaves tens of thousands there, and half a second of CPU goes by over 50,000.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable

import structlog

from agent.archive.archiver import WalArchiver
from agent.errors import AgentError, ConfigError, one_line
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.telemetry.metrics import Metrics
from agent.telemetry.news import News

IDLE_SECONDS = 1.0  # how often an idle agent looks for new .ready files that PostgreSQL has not asked for
SETTLE_SECONDS = 0.1  # how often a caller that waits for the end of the backlog looks
SHORTEST_PAUSE_SECONDS = 0.05  # between two listings, however often PostgreSQL asks
FAILURE_PAUSE_SECONDS = 5.0  # after a failure: the store's own retries have been used up by then

LOOK_SECONDS = 30.0  # between two looks at the directory while a long batch is worked off
STUCK_SECONDS = 5.0  # without an upload that ends, after which the backlog is measured anew
REMIND_SECONDS = 300.0  # until a failure that lasts is logged again

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
        self._news = News(REMIND_SECONDS, clock.monotonic)
        self._scans = 0
        self._looked_at = 0.0
        self.backlog: dict[str, int] = {}
        self.backlog_bytes = 0
        self.oldest_ready_seconds = 0.0

    @property
    def backlog_files(self) -> int:
        """How many WAL files are ready and not archived."""
        return len(self.backlog)

    async def run(self) -> None:
        """Work until cancelled.

        Nothing is uploaded before PostgreSQL has asked once. One that never asks has another archive_command, or none:
        its WAL is not ours to store, and its backlog must show.
        """
        while True:
            self._failed = False
            pending = await self._look()
            if self._archiver.was_asked:
                await self.drain(pending)
            await self._pause()

    async def _look(self) -> dict[str, int]:
        """Measure the backlog; return its names and sizes in PostgreSQL's order, none if it cannot be read."""
        self._looked_at = self._clock.monotonic()
        try:
            ready, pending = await asyncio.to_thread(self._scan)
        except ConfigError as error:
            log.warning("archive status not read", reason=error.one_line())
            self._failed = True
            return {}
        self._archiver.forget_except(ready)
        self._take_up(pending)
        return pending

    async def settle(self) -> None:
        """Return when all that is ready at the time of the call, or meanwhile becomes so, is archived.

        Also what PostgreSQL, which has ended, did not come to ask for.
        """
        before = self._scans
        self._archiver.was_asked = True
        self._archiver.asked.set()
        # The scan that may be under way began before the call.
        while self._scans < before + 2 or self.backlog:
            await self._clock.sleep(SETTLE_SECONDS)

    async def _pause(self) -> None:
        seconds = FAILURE_PAUSE_SECONDS if self._failed else IDLE_SECONDS
        await self._clock.sleep(SHORTEST_PAUSE_SECONDS)
        self._archiver.asked.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._archiver.asked.wait()
        except TimeoutError:
            pass

    def _scan(self) -> tuple[set[str], dict[str, int]]:
        """Return what is ready; of it the names and sizes of what is not known to be durable, in PostgreSQL's order."""
        ready = self._data_directory.ready_files()
        pending = {}
        for name in ready:
            state = self._data_directory.wal_file_state(name)
            # PostgreSQL itself forgets what is ready and gone.
            if state is not None and not self._archiver.is_durable(name, state):
                pending[name] = state.size
        since = self._data_directory.ready_since(next(iter(pending))) if pending else None
        # File times are wall-clock times, so their age is, too.
        self.oldest_ready_seconds = max(0.0, time.time() - since) if since is not None else 0.0
        return set(ready), pending

    def _take_up(self, pending: dict[str, int]) -> None:
        self.backlog, self.backlog_bytes = pending, sum(pending.values())
        self._scans += 1
        self._publish()

    def _publish(self) -> None:
        self._metrics.archive_backlog_files.set(len(self.backlog))
        self._metrics.archive_backlog_bytes.set(self.backlog_bytes)
        self._metrics.archive_backlog_age.set(self.oldest_ready_seconds)

    async def drain(self, pending: Iterable[str]) -> None:
        """Archive `pending` in order, and what else becomes ready, several at a time; give up at the first failure."""
        queue = deque(pending)
        running: dict[asyncio.Future[None], str] = {}
        while queue or running:
            while queue and not self._failed and len(running) < self._archiver.at_once:
                name = queue.popleft()
                running[self._archiver.start(name)] = name
            if not running:
                return
            done, _ = await asyncio.wait(running, timeout=STUCK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for outcome in done:
                self._report(running.pop(outcome), outcome)
            self._publish()
            # What piles up while the store is away, or a long batch is worked off, must show.
            if not done or self._clock.monotonic() - self._looked_at >= LOOK_SECONDS:
                under_way = set(running.values())
                queue = deque(name for name in await self._look() if name not in under_way)

    def _report(self, name: str, outcome: asyncio.Future[None]) -> None:
        error = None if outcome.cancelled() else outcome.exception()
        if error is None:
            self.backlog_bytes -= self.backlog.pop(name, 0)
            return
        # By its hint: the reason names another file each time.
        if self._news.is_news(error.hint if isinstance(error, AgentError) else repr(error)):
            log.warning("wal not archived yet", reason=one_line(error), backlog_files=self.backlog_files)
        self._failed = True
