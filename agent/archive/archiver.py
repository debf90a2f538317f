"""Makes WAL files durable: what PostgreSQL asks for, and what it is about to ask for.

Invariants:
    `archive` returns only when the content now in pg_wal is durable in the repository under its name.
    One upload per name is under way at a time; whoever asks meanwhile joins it.
    What is remembered as durable is this process's own knowledge: it dies with the process.
Memory: files in flight x (segment + its compressed form), bounded by the memory limit.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from agent.budget import MemoryBudget
from agent.domain.wal import LONG_HEADER_BYTES, WalFileKind, segment_problem, wal_file_kind
from agent.errors import AgentError, ConfigError, RepositoryUnavailable, WalConflict, WalRefused
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.postgres.wal_file import FileState, WalFile
from agent.repository.wal_archive import Stored, WalArchive
from agent.repository.wal_packing import Packed
from agent.tasks import task_group
from agent.telemetry.metrics import Metrics

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
        self.archived_files = 0
        self.archived_bytes = 0
        self.asked = asyncio.Event()
        self.was_asked = False
        self._archive = archive
        self._data_directory = data_directory
        self._guard = guard
        self._budget = budget
        self._clock = clock
        self._metrics = metrics
        self._durable: dict[str, FileState] = {}
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._executor = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="pack")

    async def run(self) -> None:
        """Own the uploads until cancelled, so that none is cut short when the hook that asked goes away."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    def is_durable(self, name: str, state: FileState | None) -> bool:
        """Tell whether this process stored exactly this state of the file."""
        return state is not None and self._durable.get(name) == state

    def forget_except(self, names: set[str]) -> None:
        """Forget what is durable but no longer waited for by PostgreSQL."""
        for name in self._durable.keys() - names:
            del self._durable[name]

    async def archive(self, name: str) -> None:
        """Return once pg_wal/`name` is durable in the repository.

        The work goes on if the caller is cancelled; asking again joins it.

        Raises:
            WalConflict: The repository holds other bytes under this name.
            WalRefused: The file is not what its name says, or of another database cluster.
            RepositoryError: It could not be stored, or that could not be confirmed.
        """
        self.was_asked = True
        self.asked.set()
        state = await asyncio.to_thread(self._data_directory.wal_file_state, name)
        while not self.is_durable(name, state):
            await asyncio.shield(self.start(name))
            if not self.is_durable(name, state):  # what was under way may have read the file before it was changed
                state = await asyncio.to_thread(self._data_directory.wal_file_state, name)

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
            self._metrics.archive_failures.labels(reason=failure_reason(error)).inc()
            self._metrics.archive_last_failure.set(self._clock.now().timestamp())
            if not outcome.cancelled():
                outcome.set_exception(error)
                outcome.exception()  # a hook that went away asks again; nobody else has to look
        else:
            if not outcome.cancelled():
                outcome.set_result(None)
        finally:
            del self._in_flight[name]

    async def _archive_one(self, name: str) -> None:
        started = self._clock.monotonic()
        identifier = await self._guard.system_identifier()
        expected = await asyncio.to_thread(self._data_directory.wal_file_state, name)
        async with self._budget.reserve(2 * (expected.size if expected is not None else 0)):
            async with task_group() as group:
                group.create_task(self._archive.foresee(name), name=f"foresee {name}")
                loop = asyncio.get_running_loop()
                packed, state = await loop.run_in_executor(self._executor, self._pack, name, identifier)
            stored = await self._archive.store(packed)
        self._durable[name] = state
        self.last_archived = name
        self._record(packed, stored, self._clock.monotonic() - started)

    def _record(self, packed: Packed, stored: Stored, seconds: float) -> None:
        kind = wal_file_kind(packed.name)
        assert kind is not None
        self.archived_files += 1
        self.archived_bytes += packed.content_bytes
        self._metrics.archived_files.labels(kind=kind.value.replace(" ", "_")).inc()
        self._metrics.archived_bytes.inc(packed.content_bytes)
        self._metrics.archived_stored_bytes.inc(stored.stored_bytes)
        self._metrics.archive_seconds.observe(seconds)
        self._metrics.archive_last_success.set(self._clock.now().timestamp())
        log.info(
            "wal archived",
            wal_file=packed.name,
            stored_bytes=stored.stored_bytes,
            already_archived=stored.already,
            seconds=round(seconds, 4),
        )

    def _pack(self, name: str, system_identifier: int) -> tuple[Packed, FileState]:
        try:
            with self._data_directory.open_wal_file(name) as file:
                _require_archivable(file, system_identifier)
                return self._archive.packer.pack(file, system_identifier), file.state
        except OSError as error:
            raise ConfigError(
                f'WAL file "{name}" cannot be read: {error.strerror}',
                hint="Run the agent as a user that may read PGDATA.",
            ) from error


def _require_archivable(file: WalFile, system_identifier: int) -> None:
    """Return if the file is what its name says, and of this database cluster, else raise `WalRefused`."""
    problem = None
    if wal_file_kind(file.name) in (WalFileKind.SEGMENT, WalFileKind.PARTIAL):
        problem = segment_problem(file.name, file.size, file.part(0, LONG_HEADER_BYTES), system_identifier)
    elif not file.size:
        problem = "it is empty"
    if problem is not None:
        raise WalRefused(
            f'WAL file "{file.name}" is not archived: {problem}',
            hint="Check that the agent's PGDATA is this server's data directory, and its disk.",
        )
