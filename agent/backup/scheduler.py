"""Takes base backups when they are due.

What is due is decided by `agent.domain.backup_schedule` from the repository's newest base backup: at start, when one
ended, and at the planned moment once more, under the lock that keeps other agents of this server from beginning one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from agent.backup.order import BackupOrder
from agent.backup.runner import BackupRunner
from agent.domain.backup_schedule import (
    BackupFrom,
    BackupHistory,
    BackupSchedule,
    PlannedBackup,
    next_backup,
    waits_for_others,
)
from agent.domain.catalog import Backup
from agent.domain.control_file import ClusterState
from agent.domain.delta_parent import BackupKind
from agent.errors import AgentError, BackupElsewhere, ConfigError, RepositoryError
from agent.ports import Clock, ObjectStore, Postgres
from agent.postgres.data_directory import DataDirectory
from agent.repository.backup_mark import refuse_while_others
from agent.repository.backups import read_catalog
from agent.repository.keys import WAL_FOLDER
from agent.tasks import first_of, in_thread
from agent.telemetry.status import BackupsStatus, CompleteBackup, NextBackup

POLL_SECONDS = 5.0  # how often the server's role and the clock are looked at
LOOK_SECONDS = 900.0  # how often the catalog is read although nothing is due: others may take backups
UNREADABLE_SECONDS = 10.0  # until a repository that could not be read is looked at again: its bucket may be being made
RETRY_SECONDS = 60.0  # after another agent was at it
FIRST_WAL_SECONDS = 5.0  # how often the first WAL file is looked for

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class BackupRules:
    """When scheduled base backups are taken, and of which server; `server` is this one's name among the replicas."""

    schedule: BackupSchedule | None
    take_from: BackupFrom
    server: str


@dataclass(frozen=True, slots=True)
class _Server:
    """The server as its data directory shows it."""

    is_primary: bool
    system_identifier: int


class BackupScheduler:
    """Has base backups taken when they are due. Run it as a service, beside its runner."""

    name = "backup schedule"

    def __init__(
        self,
        runner: BackupRunner,
        rules: BackupRules,
        store: ObjectStore,
        postgres: Postgres,
        data_directory: DataDirectory,
        clock: Clock,
    ) -> None:
        self._runner = runner
        self._rules = rules
        self._store = store
        self._postgres = postgres
        self._data_directory = data_directory
        self._clock = clock
        self._catalog: Sequence[Backup] = ()
        self._looked_at: datetime | None = None
        self._cannot_look: str | None = "the repository has not been looked at yet"
        self._look_due = 0.0  # monotonic, as is the next
        self._held: tuple[float, str] = (0.0, "")  # until when, and for what
        self._gap_since: datetime | None = None
        self._planned: PlannedBackup | None = None
        self._waiting_for: str | None = None
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        runner.on_ended = self._look_again

    @property
    def is_running(self) -> bool:
        """Whether a base backup is being taken."""
        return self._runner.running is not None

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._step()
            await first_of(self._clock.sleep(POLL_SECONDS), self._wake.wait())
            self._wake.clear()

    async def reach_over_gap(self) -> None:
        """Have a base backup taken that begins from now on; return when there is one."""
        since = self._gap_since = self._clock.now()
        self._wake.set()
        async with self._changed:
            await self._changed.wait_for(lambda: any(backup.start_time >= since for backup in self._catalog))

    def status(self) -> BackupsStatus:
        """Say what is there, what runs, and what comes."""
        schedule, run, planned = self._rules.schedule, self._runner.running, self._planned
        catalog = tuple(_complete(backup) for backup in reversed(self._catalog))
        return BackupsStatus(
            schedule=schedule.cron if schedule is not None else None,
            take_from=self._rules.take_from,
            complete=None if self._looked_at is None else len(self._catalog),
            looked_at=self._looked_at,
            newest=_newest_of_each_kind(catalog),
            running=None if run is None else run.status(),
            last_failure=self._runner.last_failure,
            next=None if planned is None else NextBackup(planned.at, planned.why),
            waiting_for=self._cannot_look or self._waiting_for,
            catalog=catalog,
        )

    async def _step(self) -> None:
        if (run := self._runner.running) is not None:
            await run.ended()
        if self._clock.monotonic() >= self._look_due:
            await self._look()
        self._planned, self._waiting_for = self._plan(await in_thread(self._server))
        if self._is_due() and await self._may_begin():
            await self._begin()

    def _look_again(self) -> None:
        self._look_due = 0.0
        self._wake.set()

    async def _look(self) -> None:
        try:
            await self._store.check()
            self._catalog = await read_catalog(self._store)
        except RepositoryError as error:
            if self._cannot_look != error.message:
                log.error("repository cannot be used", reason=error.one_line())  # noqa: TRY400 - for operators
            self._cannot_look, self._look_due = error.message, self._clock.monotonic() + UNREADABLE_SECONDS
            return
        if self._cannot_look is not None:
            log.info("repository found", backups=len(self._catalog))
        self._cannot_look = None
        self._looked_at, self._look_due = self._clock.now(), self._clock.monotonic() + LOOK_SECONDS
        async with self._changed:
            self._changed.notify_all()

    def _server(self) -> _Server | None:
        """Look at the data directory; None unless the server runs and takes connections."""
        try:
            control = self._data_directory.control_file()
        except ConfigError:
            return None
        if self._data_directory.postmaster_status() != "ready":
            return None
        return _Server(control.state is ClusterState.IN_PRODUCTION, control.system_identifier)

    def _plan(self, server: _Server | None) -> tuple[PlannedBackup | None, str | None]:
        """Return what is planned, or what it waits for."""
        if server is None:
            return None, "PostgreSQL is not running"
        if self._cannot_look is not None:
            return None, None
        rules = self._rules
        planned = next_backup(rules.schedule, self._history(server), self._clock.now())
        if planned is None:
            return None, None
        pause = waits_for_others(planned.why, rules.take_from, is_primary=server.is_primary, server=rules.server)
        if pause is None:
            return None, "this server is a standby: the primary's agent takes base backups"
        return PlannedBackup(planned.at + pause, planned.why), None

    def _history(self, server: _Server) -> BackupHistory:
        runner = self._runner
        ours = [backup for backup in self._catalog if backup.system_identifier in (None, server.system_identifier)]
        return BackupHistory(
            newest_start=max((backup.start_time for backup in ours), default=None),
            newest_finish=max((backup.finish_time for backup in ours), default=None),
            gap_since=self._gap_since,
            failures=runner.failures,
            last_failure=None if runner.last_failure is None else runner.last_failure.at,
            given_up_at=runner.given_up_at,
        )

    def _is_due(self) -> bool:
        return self._planned is not None and self._planned.at <= self._clock.now()

    async def _may_begin(self) -> bool:
        if self._clock.monotonic() >= self._held[0] and not self._catalog and not await self._archiving_works():
            self._hold(FIRST_WAL_SECONDS, "the first WAL file is to be archived")
        if self._clock.monotonic() < self._held[0]:
            self._waiting_for = self._held[1]
            return False
        return True

    def _hold(self, seconds: float, reason: str) -> None:
        self._held = (self._clock.monotonic() + seconds, reason)

    async def _archiving_works(self) -> bool:
        """Tell whether the repository holds WAL; if not, have PostgreSQL finish a segment, for it may be idle.

        A base backup would wait for its WAL in vain, after all its work.
        """
        try:
            async for _ in self._store.list(WAL_FOLDER):
                return True
            await self._postgres.switch_wal()
        except AgentError as error:
            log.warning("the first base backup has to wait", reason=error.one_line())
        return False

    async def _begin(self) -> None:
        assert self._planned is not None
        run = self._runner.start(BackupOrder(self._planned.why), if_still=self._is_still_due)
        await run.ended()
        try:
            run.result()
        except BackupElsewhere as error:
            log.info("base backup left to another agent", reason=error.message)
            self._hold(RETRY_SECONDS, error.message)
        except AgentError:
            pass  # recorded and told by the runner

    async def _is_still_due(self) -> bool:
        """Look again now that no other agent of this server can begin: one may have just completed a backup.

        Raises:
            BackupElsewhere: Another server's agent is taking one.
        """
        await self._look()
        self._planned, self._waiting_for = self._plan(await in_thread(self._server))
        if self._is_due() and self._rules.take_from is BackupFrom.STANDBY:
            await refuse_while_others(self._store, self._clock.now())
        return self._is_due()


def _newest_of_each_kind(catalog: Sequence[CompleteBackup]) -> tuple[CompleteBackup, ...]:
    """Pick from a catalog whose newest comes first."""
    newest = {backup.kind: backup for backup in reversed(catalog)}
    return tuple(sorted(newest.values(), key=lambda backup: backup.finish_time, reverse=True))


def _complete(backup: Backup) -> CompleteBackup:
    return CompleteBackup(
        name=backup.name,
        kind=BackupKind.DELTA if backup.is_delta else BackupKind.FULL,
        start_time=backup.start_time,
        finish_time=backup.finish_time,
        size_bytes=backup.size_bytes,
        stored_bytes=backup.stored_bytes,
        timeline=backup.timeline,
        parent=backup.parent,
        permanent=backup.permanent,
        corrupt_pages=backup.corrupt_pages,
    )
