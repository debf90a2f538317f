"""Makes WAL files durable: what PostgreSQL asks for, and what it is about to ask for.

Invariants:
    `archive` returns only when the content now in pg_wal is durable in the repository under its name.
    One upload per name is under way at a time; whoever asks meanwhile joins it.
    What is remembered as durable is this process's own knowledge: it dies with the process.
Memory: files in flight x what `uploader` says of one, bounded by the memory limit.
"""

import asyncio
from datetime import datetime
from typing import Protocol

import structlog

from agent.archive.uploader import WalUploader
from agent.budget import MemoryBudget
from agent.domain.wal import wal_file_kind
from agent.errors import AgentError, RepositoryUnavailable, WalConflict, WalRefused, one_line
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.postgres.wal_file import FileState
from agent.repository.wal_archive import Stored, WalArchive
from agent.repository.wal_packing import Description
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Failure

log = structlog.get_logger()


class Guard(Protocol):
    """Answers whose WAL may go into this repository."""

    async def system_identifier(self) -> int:
        """Return the database cluster that the repository and the data directory both belong to, or raise."""


def failure_reason(error: Exception) -> str:
    """Name the kind of failure for a metric label: a small fixed set."""
    match error:
        case WalConflict():
            return "conflict"
        case WalRefused():
            return "refused"
        case RepositoryUnavailable():
            return "unavailable"
        case AgentError():
            return "repository"
        case _:
            return "internal"


class WalArchiver:
    """Archives WAL files out of a data directory, each name by one task at a time. Run it as a service."""

    name = "archiver"

    def __init__(
        self,
        archive: WalArchive,
        data_directory: DataDirectory,
        guard: Guard,
        *,
        concurrency: int,
        budget: MemoryBudget,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.concurrency = concurrency
        self.last_archived: str | None = None
        self.last_archived_at: datetime | None = None
        self.failure: Failure | None = None
        self.archived_files = 0
        self.archived_bytes = 0
        self.asked = asyncio.Event()
        self.was_asked = False
        self._uploader = WalUploader(archive, data_directory, budget)
        self._data_directory = data_directory
        self._guard = guard
        self._clock = clock
        self._metrics = metrics
        self._is_ahead = False
        self._failures = 0
        self._durable: dict[str, FileState] = {}
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Own the uploads until cancelled, so that none is cut short when the hook that asked goes away."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    @property
    def at_once(self) -> int:
        """How many of the files that come one after the other may be uploaded at once.

        One, unless the last one's name was free: then no other server is ahead of this one. The first file in which a
        clone differs is refused, and one that is uploaded beside it would take the place of the original's next.
        """
        return self.concurrency if self._is_ahead else 1

    def is_durable(self, name: str, state: FileState | None) -> bool:
        """Tell whether this process stored exactly this state of the file."""
        return state is not None and self._durable.get(name) == state

    def forget_except(self, names: set[str]) -> None:
        """Forget what is durable but no longer waited for by PostgreSQL."""
        for name in self._durable.keys() - names:
            del self._durable[name]

    async def archive(self, name: str, *, handed_over: str | None = None) -> None:
        """Return once pg_wal/`name` is durable in the repository.

        The work goes on if the caller is cancelled; asking again joins it. `handed_over` is what the caller sees of
        its file, as `FileState.seen_elsewhere`, if it told.

        Raises:
            WalConflict: The repository holds other bytes under this name.
            WalRefused: The file is not what its name says, of another database cluster, or not the one handed over.
            RepositoryError: It could not be stored, or that could not be confirmed.
        """
        state = await asyncio.to_thread(self._handed_over, name, handed_over)
        self.was_asked = True
        self.asked.set()
        while not self.is_durable(name, state):
            await asyncio.shield(self.start(name))
            if not self.is_durable(name, state):  # what was under way may have read the file before it was changed
                state = await asyncio.to_thread(self._handed_over, name, handed_over)

    def _handed_over(self, name: str, seen: str | None) -> FileState | None:
        """Return the state of pg_wal/`name`, None if it is absent; raise if it is not the file that the caller sees."""
        state = self._data_directory.wal_file_state(name)
        if seen is not None and state is not None and seen != state.seen_elsewhere:
            raise WalRefused(
                f'WAL file "{name}" of {self._data_directory.path} is not the one handed over: its size and time of '
                f"change are {state.seen_elsewhere}, PostgreSQL's has {seen}",
                hint="Give the agent the volume and the PGDATA of the server whose archive_command calls it.",
            )
        return state

    def start(self, name: str) -> asyncio.Future[None]:
        """Return the outcome-to-be of making `name` durable; begin that unless it is under way already."""
        outcome = self._in_flight.get(name)
        if outcome is None:
            if self._group is None:
                raise RepositoryUnavailable("the agent is starting or stopping")
            outcome = self._in_flight[name] = asyncio.get_running_loop().create_future()
            self._group.create_task(self._settle(name, outcome), name=f"archive {name}")
        return outcome

    async def _settle(self, name: str, outcome: asyncio.Future[None]) -> None:
        try:
            await self._archive_one(name)
        except asyncio.CancelledError:
            outcome.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - the edge of one request: whoever asked for it is told
            self._is_ahead = False
            self._failures += 1
            self._metrics.archive_failures.labels(reason=failure_reason(error)).inc()
            self.failure = Failure(self._clock.now(), one_line(error))
            self._metrics.archive_last_failure.set(self.failure.at.timestamp())
            if not outcome.cancelled():
                outcome.set_exception(error)
                outcome.exception()  # a hook that went away asks again; nobody else has to look
        else:
            if not outcome.cancelled():
                outcome.set_result(None)
        finally:
            del self._in_flight[name]

    async def _archive_one(self, name: str) -> None:
        started, failures = self._clock.monotonic(), self._failures
        uploaded = await self._uploader.upload(name, await self._guard.system_identifier())
        self._durable[name] = uploaded.state
        if failures == self._failures:  # else another's place may have been free behind the file that failed meanwhile
            self._is_ahead = not uploaded.stored.already
        self.last_archived, self.last_archived_at, self.failure = name, self._clock.now(), None
        self._record(uploaded.description, uploaded.stored, self._clock.monotonic() - started)

    def _record(self, description: Description, stored: Stored, seconds: float) -> None:
        kind = wal_file_kind(description.name)
        assert kind is not None
        self.archived_files += 1
        self.archived_bytes += description.content_bytes
        self._metrics.archived_files.labels(kind=kind.value.replace(" ", "_")).inc()
        self._metrics.archived_bytes.inc(description.content_bytes)
        self._metrics.archived_stored_bytes.inc(stored.stored_bytes)
        self._metrics.archive_seconds.observe(seconds)
        assert self.last_archived_at is not None
        self._metrics.archive_last_success.set(self.last_archived_at.timestamp())
        log.info(
            "wal archived",
            wal_file=description.name,
            stored_bytes=stored.stored_bytes,
            already_archived=stored.already,
            seconds=round(seconds, 4),
        )
