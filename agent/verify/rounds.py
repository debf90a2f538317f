"""Reads the repository back by itself, a round whenever PITR_VERIFY_SCHEDULE says. Listings are `watch`'s to look at.

A round keeps to PITR_VERIFY_BYTES_PER_DAY, and to one object at a time, in a thread of low priority; it begins with
what was verified longest ago, and goes on another day, or in another process, where it stopped. While a base backup
runs, or the server is no primary, nothing is read.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from agent.domain.backup_schedule import BackupSchedule
from agent.domain.catalog import Backup
from agent.domain.verification_order import VerificationRecord, in_turn, wal_shares
from agent.errors import AgentError, RepositoryCorrupt
from agent.ports import Clock, ObjectInfo
from agent.repository.backups import list_tars, read_catalog
from agent.repository.keys import sentinel_key
from agent.repository.verification_record import read_records, write_record
from agent.repository.wal_archive import WalObject
from agent.tasks import in_thread, task_group
from agent.telemetry.metrics import Metrics
from agent.telemetry.progress import Progress
from agent.telemetry.status import Failure, ReadBackup, ReadingStatus, RunningReading
from agent.verify.content import BackupContent, Reading, check_tar, check_wal, lacking, open_backup

POLL_SECONDS = 1.0  # how often it is looked whether a round is due, and whether it has to make way
RETRY_SECONDS = 3600.0
_WAL_FILES = 16  # that are read between two looks at what is left of the day's bytes
_STORE_SECONDS = 5.0
_NICE = 10
_TOLD = 20  # problems in the status

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class VerifyRules:
    """When rounds begin, and how much is read a day (UTC), in bytes as stored, but for one object that exceeds it."""

    schedule: BackupSchedule | None
    bytes_per_day: int


class _MakeWay(Exception):
    """A base backup begins, or the server is no primary any more."""


def low_priority() -> ThreadPoolExecutor:
    """Return a thread of low priority for CPU, and for I/O where the scheduler has such."""

    def lower() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.nice(0) + _NICE, 19))

    return ThreadPoolExecutor(1, "verify", initializer=lower)


class ReadingRounds:
    """Run it as a service."""

    name = "reading back"

    def __init__(
        self, reading: Reading, rules: VerifyRules, may_run: Callable[[], bool], clock: Clock, metrics: Metrics
    ) -> None:
        """`may_run`: whether this agent is to read now; asked every second, in a thread."""
        self._reading = reading
        self._rules = rules
        self._may_run = may_run
        self._clock = clock
        self._metrics = metrics
        self._records: dict[str, VerificationRecord] = {}
        self._catalog: Sequence[Backup] = ()
        self._started_at = clock.now()
        self._last_round: datetime | None = None
        self._ended_at: datetime | None = None
        self._failure: Failure | None = None
        self._held_until = 0.0
        self._running: Progress | None = None
        self._left = 0  # bytes of the day

    async def run(self) -> None:
        """Work until cancelled."""
        if self._rules.schedule is None:
            await asyncio.Event().wait()
        while True:
            await self._clock.sleep(POLL_SECONDS)
            if self._clock.monotonic() >= self._held_until and await in_thread(self._may_run):
                await self._round()

    def status(self) -> ReadingStatus:
        """Say what was read when, and what is wrong."""
        schedule, running = self._rules.schedule, self._running
        backups = [self._read_backup(backup.name) for backup in self._catalog]
        problems = [f"{each.name}: {problem}" for each in backups for problem in each.problems]
        return ReadingStatus(
            schedule=None if schedule is None else schedule.cron,
            bytes_per_day=self._rules.bytes_per_day,
            running=None if running is None else RunningReading(running.done, running.total, running.ratio),
            ended_at=self._ended_at,
            failure=self._failure,
            next_at=None if schedule is None else schedule.first_after(self._last_round or self._started_at),
            problems=len(problems),
            first_problems=tuple(problems[:_TOLD]),
            backups=tuple(backups),
        )

    def _read_backup(self, name: str) -> ReadBackup:
        record = self._records.get(name, VerificationRecord())
        return ReadBackup(name, record.verified_at, record.known_problems)

    async def _round(self) -> None:
        """Do a round, if one is due; one that had to make way is gone on with when it may."""
        try:
            if not await self._is_due():
                return
            async with self._until_in_the_way():
                await self._verify()
        except _MakeWay:
            log.info("reading back makes way")
            return
        except AgentError as error:
            self._failed(error.one_line())
            return
        except Exception as error:
            log.exception("reading back broke")
            self._failed(f"internal error {type(error).__name__}; see the agent's log")
            return
        finally:
            self._running = None
        self._ended()

    async def _is_due(self) -> bool:
        schedule = self._rules.schedule
        if self._last_round is None:
            # A new agent makes up for a missed round, but does not begin with one.
            await self._look()
            read_at = [each.read_at for each in self._records.values() if each.read_at is not None]
            self._last_round = max(read_at, default=self._started_at)
        return schedule is not None and schedule.last_until(self._clock.now()) > self._last_round

    def _ended(self) -> None:
        self._last_round = self._ended_at = self._clock.now()
        self._failure = None
        status = self.status()
        for problem in status.first_problems:
            log.error("object damaged", problem=problem)
        log.info("repository read back", backups=len(status.backups), problems=status.problems)

    def _failed(self, reason: str) -> None:
        self._failure = Failure(self._clock.now(), reason)
        self._held_until = self._clock.monotonic() + RETRY_SECONDS
        self._metrics.verify_failures.inc()
        log.error("reading back failed", reason=reason)

    @asynccontextmanager
    async def _until_in_the_way(self) -> AsyncIterator[None]:
        async def watch() -> None:
            while await in_thread(self._may_run):
                await self._clock.sleep(POLL_SECONDS)
            raise _MakeWay

        async with task_group() as group:
            watching = group.create_task(watch(), name="watch what reading back is in the way of")
            yield
            watching.cancel()

    async def _look(self) -> None:
        self._catalog = await read_catalog(self._reading.store)
        # Another agent may have gone on with it meanwhile; what could not be stored is known here alone.
        records = await read_records(self._reading.store, [backup.name for backup in self._catalog])
        self._records = {name: _newer(record, self._records.get(name)) for name, record in records.items()}

    async def _verify(self) -> None:
        reading = self._reading
        await self._look()
        backups = self._catalog
        files = {file.name: file for file in await reading.archive.list_files()}
        shares = wal_shares(backups, files)
        now = self._clock.now()
        self._left = self._rules.bytes_per_day - sum(record.bytes_on(now) for record in self._records.values())
        self._records = {name: record.resumed(now) for name, record in self._records.items()}
        total = 0
        for backup in backups:
            record = self._records[backup.name]
            tars = () if record.is_complete else await list_tars(reading.store, backup.name)
            total += sum(tar.size for tar in tars if tar.key not in record.tars)
            total += sum(files[name].size for name in shares[backup.name] if name > record.wal_through)
        self._running = Progress("reading back", 0, max(min(total, self._left), 0))
        for backup in in_turn(backups, self._records):
            if self._left > 0:
                await self._read(backup, [files[name] for name in shares[backup.name]])

    async def _read(self, backup: Backup, share: Sequence[WalObject]) -> None:
        """Read what is left of a base backup and its WAL, as far as the day's bytes reach."""
        before = self._records[backup.name]
        try:
            if await self._read_tars(backup) and await self._read_wal(backup, share):
                self._records[backup.name] = self._records[backup.name].ended(self._clock.now())
            found = self._records[backup.name].found
            if found and await self._reading.store.head(sentinel_key(backup.name)) is None:  # expired meanwhile
                self._catalog = [each for each in self._catalog if each != backup]
        finally:
            if self._records[backup.name] != before:
                with suppress(TimeoutError):  # the agent may be ending
                    async with asyncio.timeout(_STORE_SECONDS):
                        await write_record(self._reading.store, backup.name, self._records[backup.name])

    async def _read_tars(self, backup: Backup) -> bool:
        """Read tars one after the other; return whether all were read."""
        record = self._records[backup.name]
        if record.is_complete:
            return True
        try:
            content = await open_backup(self._reading, backup)
        except RepositoryCorrupt as error:
            self._note(backup, 0, [error.message])
            return True
        if not record.tars:
            self._note(backup, 0, content.problems)
        for tar in content.tars:
            if tar.key not in record.tars:
                if self._left <= 0:
                    return False
                await self._read_tar(backup, content, tar)
                await write_record(self._reading.store, backup.name, self._records[backup.name])
        if not self._records[backup.name].found:
            lost = await lacking(self._reading, content, self._records[backup.name].files)
            self._note(backup, 0, [] if lost is None else [lost])
        return True

    async def _read_tar(self, backup: Backup, content: BackupContent, tar: ObjectInfo) -> None:
        before = content.listed.arrived
        checked = await check_tar(self._reading, content, tar, self._on_read)
        self._note(backup, checked.size, checked.problems)
        record = self._records[backup.name]
        files = record.files + content.listed.arrived - before
        self._records[backup.name] = replace(record, tars=record.tars | {tar.key}, files=files)

    async def _read_wal(self, backup: Backup, share: Sequence[WalObject]) -> bool:
        """Read the WAL files that were not yet; return whether all were."""
        left = [file for file in share if file.name > self._records[backup.name].wal_through]
        for start in range(0, len(left), _WAL_FILES):
            if self._left <= 0:
                return False
            some = left[start : start + _WAL_FILES]
            async with aclosing(check_wal(self._reading, some, self._on_read)) as outcomes:
                async for checked in outcomes:
                    self._note(backup, checked.size, checked.problems)
            self._records[backup.name] = replace(self._records[backup.name], wal_through=some[-1].name)
        return True

    def _note(self, backup: Backup, size: int, problems: Sequence[str]) -> None:
        self._records[backup.name] = self._records[backup.name].read(size, problems, self._clock.now())
        if size:
            self._metrics.verify_objects.inc()

    def _on_read(self, count: int) -> None:
        self._metrics.verify_bytes.inc(count)
        self._left -= count
        if self._running is not None:
            self._running = replace(self._running, done=self._running.done + count)


def _newer(stored: VerificationRecord, ours: VerificationRecord | None) -> VerificationRecord:
    if ours is None or ours.read_at is None or (stored.read_at is not None and stored.read_at >= ours.read_at):
        return stored
    return ours
