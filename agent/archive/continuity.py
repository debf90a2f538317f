"""Finds WAL that PostgreSQL takes for archived, and that is not in the repository.

On a primary, when the agent starts, when the timeline changes (a promotion), and every few minutes: what must be there
by now is compared with a listing. What pg_wal still has is uploaded, through the archiver, which checks it and replaces
nothing. The rest is lost: that is said once, and a new base backup is asked for, so that what comes later can be
restored.

Invariants:
    The server's WAL is looked at before the repository is listed: what is marked done by then must be in the listing.
    A gap is declared when it is seen twice: after a switch-over the old primary may still be uploading.
    At most one base backup is asked for a gap.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from agent.archive.archiver import Guard, WalArchiver
from agent.domain.catalog import Backup
from agent.domain.control_file import ClusterState
from agent.domain.timeline import Stretch, history_name, path_to
from agent.domain.wal import segment_position
from agent.domain.wal_continuity import (
    Gap,
    ServerWal,
    find_gaps,
    finished_end,
    first_wanted,
    needs_backup,
)
from agent.domain.wal_runs import add_segment
from agent.errors import AgentError, RepositoryError, one_line
from agent.ports import Clock, ObjectStore
from agent.postgres.data_directory import DataDirectory
from agent.repository.backups import read_catalog
from agent.repository.keys import WAL_FOLDER
from agent.repository.wal_archive import WalArchive, parse_wal_object
from agent.tasks import in_thread, task_group
from agent.telemetry.metrics import Metrics

POLL_SECONDS = 3.0  # how often the timeline is looked at
CHECK_SECONDS = 300.0
CONFIRM_SECONDS = 5.0  # until a second look at a gap
RETRY_SECONDS = 60.0  # after a check that could not be made

log = structlog.get_logger()


class Backups(Protocol):
    """Takes base backups."""

    @property
    def is_running(self) -> bool:
        """Whether a base backup is being taken."""

    async def reach_over_gap(self) -> None:
        """Have a base backup taken that begins from now on; return when there is one. What fails is tried again."""


class WalContinuity:
    """Compares the repository with the server's WAL, and closes the gaps that can be closed. Run it as a service."""

    name = "wal continuity"

    def __init__(
        self,
        store: ObjectStore,
        archive: WalArchive,
        archiver: WalArchiver,
        guard: Guard,
        data_directory: DataDirectory,
        backups: Backups,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.gaps: tuple[Gap, ...] = ()
        self._store = store
        self._archive = archive
        self._archiver = archiver
        self._guard = guard
        self._data_directory = data_directory
        self._backups = backups
        self._clock = clock
        self._metrics = metrics
        self._group: asyncio.TaskGroup | None = None
        self._path: tuple[Stretch, ...] = ()
        self._due_at = 0.0
        self._proven = 0
        self._suspected: set[str] = set()
        self._backup_asked: set[str] = set()
        self._is_blind = False

    async def run(self) -> None:
        """Work until cancelled."""
        async with task_group() as self._group:
            while True:
                await self._look()
                await self._clock.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        try:
            server = await in_thread(self._server_wal)
            if server is not None and (server.path != self._path or self._clock.monotonic() >= self._due_at):
                await self._check(server)
                self._is_blind = False
        except AgentError as error:
            if not self._is_blind:
                log.warning("wal continuity cannot be checked", reason=error.one_line())
            self._is_blind = True
            self._due_at = self._clock.monotonic() + RETRY_SECONDS

    def _server_wal(self) -> ServerWal | None:
        """Look at the volume; None unless a primary runs that archives."""
        control = self._data_directory.control_file()
        if self._data_directory.postmaster_status() != "ready" or control.state is not ClusterState.IN_PRODUCTION:
            return None
        # After a promotion the control file knows the new timeline only from the next checkpoint on.
        timeline = max([control.timeline, *(int(name[:8], 16) for name in self._data_directory.segment_names())])
        path = path_to(timeline, self._data_directory.timeline_history(timeline))
        status = self._data_directory.archive_status()
        end = finished_end(path, status.ready | status.done, control.wal_segment_bytes)
        return None if end is None else ServerWal(path, end, status.ready, control.wal_segment_bytes)

    async def _check(self, server: ServerWal) -> None:
        if server.path != self._path:
            self._path, self._proven = server.path, 0
        self._due_at = self._clock.monotonic() + CHECK_SECONDS
        await self._guard.system_identifier()
        backups = await read_catalog(self._store)
        held = await self._held(server, backups)
        gaps = find_gaps(server, backups, held, self._proven)
        await self._archive_history(server)
        if gaps and (filled := await self._fill(server, gaps)):
            for name in filled:
                add_segment(held, name, server.segment_bytes)
            log.warning(
                "wal gap filled from pg_wal", first_segment=filled[0], last_segment=filled[-1], segments=len(filled)
            )
            gaps = find_gaps(server, backups, held, self._proven)
        self._proven = 0 if gaps else server.end
        await self._report(server, gaps)
        self._ask_for_backup([gap for gap in self.gaps if needs_backup(gap, server, backups)])

    async def _held(self, server: ServerWal, backups: Sequence[Backup]) -> dict[int, list[range]]:
        begin = max(self._proven, first_wanted(server, backups) or 0)
        after = f"{WAL_FOLDER}{server.segment(begin - 1)}~" if begin else ""
        held: dict[int, list[range]] = {}
        async for info in self._store.list(WAL_FOLDER, after=after):
            if (item := parse_wal_object(info)) is not None:
                add_segment(held, item.name, server.segment_bytes)
        return held

    async def _archive_history(self, server: ServerWal) -> None:
        name = history_name(server.timeline)
        if server.timeline > 1 and name not in server.pending and not await self._archive.find(name):
            await self._upload([name])

    async def _fill(self, server: ServerWal, gaps: Sequence[Gap]) -> list[str]:
        """Upload what pg_wal still has of `gaps`; return the names of what is archived now, in order."""
        return await self._upload(await in_thread(self._still_there, server, gaps))

    def _still_there(self, server: ServerWal, gaps: Sequence[Gap]) -> list[str]:
        return sorted(name for name in self._data_directory.segment_names() if _is_in(name, server, gaps))

    async def _upload(self, names: Sequence[str]) -> list[str]:
        stored: list[str] = []
        at_once = self._archiver.concurrency
        for index in range(0, len(names), at_once):
            outcomes = {name: self._archiver.start(name) for name in names[index : index + at_once]}
            await asyncio.wait(outcomes.values())
            for name, outcome in outcomes.items():
                error = outcome.exception()
                if isinstance(error, RepositoryError):
                    raise error
                if error is None:
                    stored.append(name)
                else:
                    log.error("wal of a gap cannot be archived", wal_file=name, reason=one_line(error))
        return stored

    async def _report(self, server: ServerWal, gaps: Sequence[Gap]) -> None:
        declared = {gap.first for gap in self.gaps}
        self.gaps = tuple(gap for gap in gaps if gap.first in self._suspected)
        self._suspected = {gap.first for gap in gaps}
        if len(self.gaps) < len(gaps):
            self._due_at = self._clock.monotonic() + CONFIRM_SECONDS
        self._metrics.wal_gaps.set(len(self.gaps))
        self._metrics.wal_gap_segments.set(sum(len(gap.numbers) for gap in self.gaps))
        self._metrics.wal_continuity_last_check.set(self._clock.now().timestamp())
        for gap in self.gaps:
            if gap.first not in declared:
                there = await in_thread(self._still_there, server, [gap])
                log.error(
                    "wal segments missing", first_segment=gap.first, last_segment=gap.last, segments=len(gap.numbers),
                    still_in_pg_wal=len(there), hint="They are lost unless another server's pg_wal has them.",
                )  # fmt: skip
        for first in sorted(declared - {gap.first for gap in self.gaps}):
            log.info("wal gap closed", first_segment=first)

    def _ask_for_backup(self, gaps: Sequence[Gap]) -> None:
        self._backup_asked &= {gap.first for gap in self.gaps}
        new = [gap.first for gap in gaps if gap.first not in self._backup_asked]
        if new and not self._backups.is_running:
            assert self._group is not None
            self._backup_asked.update(new)
            self._group.create_task(self._back_up(new), name="base backup after a WAL gap")

    async def _back_up(self, gaps: Sequence[str]) -> None:
        log.warning("base backup asked for because of a wal gap", first_segment=gaps[-1], gaps=len(gaps))
        await self._backups.reach_over_gap()
        self._due_at = self._clock.monotonic()


def _is_in(name: str, server: ServerWal, gaps: Sequence[Gap]) -> bool:
    position = segment_position(name, server.segment_bytes)
    if position is None or not any(position[1] in gap.numbers for gap in gaps):
        return False
    return server.segment(position[1]) == name
