"""Takes base backups of a running server, from its data directory: full ones, and deltas on top of others.

The steps, each only after the one before succeeded:

    backup start -> tar parts -> pg_control.tar -> backup stop -> backup_label.tar
      -> backup_manifest.zst -> metadata.json -> files_metadata.json
      -> every WAL segment from start to stop, the backup history file, and the timeline's if the server has it, seen in
         the repository
      -> sentinel

Invariants:
    A sentinel references only durable objects, and a backup with a sentinel can be made consistent.
    A backup that is given up, or cancelled, has no sentinel, and its objects are removed; the sentinel first, should
    its writing have been in doubt. After SIGKILL objects without a sentinel may remain; they are no backup.
    An existing name is never used again, and another's sentinel is neither replaced nor removed.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import datetime

import google_crc32c
import structlog

from agent.backup.delta import Delta, DeltaPlanner
from agent.backup.limits import BackupLimits
from agent.backup.part_upload import PartUpload, Totals
from agent.backup.record import BackupRecord
from agent.backup.wal_needed import needed_wal_files, wait_until_archived
from agent.domain.backup_label import parse_backup_label, parse_tablespace_map
from agent.domain.backup_schedule import BackupFrom
from agent.domain.catalog import Backup
from agent.domain.control_file import ClusterState, ControlFile, parse_control_file
from agent.domain.delta_parent import BackupKind, DeltaPolicy
from agent.domain.lsn import format_lsn
from agent.domain.timeline import history_name
from agent.domain.wal import segment_name
from agent.errors import AgentError, BackupFailed, RepositoryError
from agent.ports import BackupSession, BackupStop, Clock, ObjectStore, Postgres, ServerInfo
from agent.postgres.data_directory import DataDirectory
from agent.postgres.data_files import CONTROL_FILE, DataFile, approximate_bytes, tablespaces, walk
from agent.postgres.file_content import OpenContent, WholeFiles
from agent.postgres.page_check import page_rules
from agent.repository.backup_documents import BackupFacts, sentinel_document
from agent.repository.backup_mark import backup_mark, mark_key
from agent.repository.backups import owner_by_backups
from agent.repository.key_check import refuse_other_key
from agent.repository.keys import BACKUP_FOLDER, backup_folder, sentinel_key, tar_folder
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_parts import small_tar
from agent.tasks import in_thread, task_group
from agent.telemetry.metrics import Metrics
from agent.telemetry.progress import CHECKPOINT_STAGE, Progress, ReportProgress

_PING_SECONDS = 10.0
_CLEAN_UP_SECONDS = 60.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Begun:
    """A backup between start and stop."""

    name: str
    started_at: datetime
    start_lsn: int
    server: ServerInfo
    control: ControlFile
    tablespaces: Mapping[int, str]
    delta: Delta | None


class BackupTaker:
    """Takes base backups of one server, one at a time."""

    def __init__(
        self,
        store: ObjectStore,
        postgres: Postgres,
        data_directory: DataDirectory,
        objects: ObjectFormat,
        limits: BackupLimits,
        clock: Clock,
        metrics: Metrics,
        deltas: DeltaPolicy,
        take_from: BackupFrom = BackupFrom.PRIMARY,
    ) -> None:
        self._store = store
        self._postgres = postgres
        self._data_directory = data_directory
        self._objects = objects
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._deltas = DeltaPlanner(store, objects, postgres, data_directory, deltas)
        self._take_from = take_from
        self._is_running = False

    async def take(
        self,
        report: ReportProgress,
        kind: BackupKind = BackupKind.AUTO,
        *,
        permanent: bool = False,
        fast: bool = True,
    ) -> Backup:
        """Take a base backup; return when its sentinel is stored, and with it all that a restore needs.

        permanent: expiry never removes it. fast: the checkpoint that it begins with is written at once, not spread over
        `checkpoint_timeout` times `checkpoint_completion_target` as any other; where standbys take them, it always is.

        Cancelled, it gives the backup up; that takes a minute at most.

        Raises:
            BackupFailed: It was given up. It has no sentinel; what was uploaded is removed where that is possible.
        """
        if self._is_running:
            raise BackupFailed("a base backup is already running", hint="Wait until it has ended.")
        self._is_running = True
        self._metrics.backup_in_progress.set(1)
        taken, result = BackupKind.FULL, "failed"
        try:
            backup = await self._take(report, kind, permanent=permanent, fast=fast)
            taken, result = BackupKind.DELTA if backup.is_delta else BackupKind.FULL, "ok"
        except BackupFailed:
            raise
        except AgentError as error:
            raise BackupFailed(f"the base backup was given up: {error.message}", hint=error.hint) from error
        else:
            return backup
        finally:
            self._is_running = False
            self._metrics.backup_in_progress.set(0)
            self._metrics.backup_progress.set(0)
            self._metrics.backups.labels(taken, result).inc()

    async def _take(self, report: ReportProgress, kind: BackupKind, *, permanent: bool, fast: bool) -> Backup:
        started_at, begun, facts = self._clock.now(), None, None
        server = await self._checked_server()
        total_bytes = await in_thread(self._total_bytes)
        async with AsyncExitStack() as marked:  # until nothing is left of one that is given up
            try:
                with closing(BackupRecord()) as record:
                    async with self._postgres.backup_session() as session:
                        self._tell(report, CHECKPOINT_STAGE, 0, 0)
                        # Other servers' agents hear of it only when it has a name.
                        fast = fast or self._take_from is BackupFrom.STANDBY
                        start_lsn = await session.start(f"pitr {started_at:%Y-%m-%dT%H:%M:%SZ}", fast=fast)
                        started = await self._begin(server, started_at, start_lsn, kind, permanent=permanent)
                        if self._take_from is BackupFrom.STANDBY:
                            await marked.enter_async_context(backup_mark(self._store, started.name, self._clock))
                        begun = started  # from here on what is stored under its name is ours
                        upload = PartUpload(
                            self._store, tar_folder(begun.name), self._objects, self._limits, self._clock, record,
                            lambda done: self._tell(report, "copying files", done, total_bytes),
                        )  # fmt: skip
                        await self._copy(session, begun, upload, record)
                        # What was measured before the start may have been dropped since.
                        self._tell(report, "copying files", upload.totals.done_bytes, upload.totals.done_bytes)
                        stop = await self._stop(session, begun)
                        stopped_at = self._clock.now()
                    await self._store_label(begun, stop, upload, record)
                    facts = _facts(begun, stop, stopped_at, upload.totals, permanent=permanent)
                    await record.store(self._store, self._objects, facts)  # meanwhile its WAL is archived
                    await self._wait_for_wal(begun, stop, report)
                    if begun.delta is not None:  # last: a record of millions of files takes its time
                        await self._deltas.require_parents(begun.delta)
                    await self._store_sentinel(facts)
                    self._observe(facts, upload.totals)
                    if begun.delta is not None:
                        begun.delta.log_counts(facts.name)
                    return facts.backup()
            except BaseException:
                if begun is not None:
                    await self._remove(begun.name, sentinel_document(facts) if facts is not None else None)
                raise

    async def _copy(self, session: BackupSession, begun: _Begun, upload: PartUpload, record: BackupRecord) -> None:
        """Store the data directory, pg_control last, as long as the session is alive."""
        with closing(upload):
            async with self._kept_alive(session):
                files = await in_thread(self._walk, begun.control, begun.tablespaces)
                await upload.upload(files, await in_thread(self._open_content, begun))
                await self._store_control_file(begun, upload, record)

    def _tell(self, report: ReportProgress, stage: str, done: int, total: int) -> None:
        progress = Progress(stage, done, total)
        self._metrics.backup_progress.set(progress.ratio)
        report(progress)

    def _walk(self, control: ControlFile, spaces: Mapping[int, str]) -> Iterator[DataFile]:
        segment_bytes = control.relation_segment_blocks * control.block_bytes
        return walk(self._data_directory.path, _version_directory(control), spaces, segment_bytes=segment_bytes)

    def _total_bytes(self) -> int:
        directory = self._data_directory
        return approximate_bytes(
            directory.path, _version_directory(directory.control_file()), tablespaces(directory.path)
        )

    async def _checked_server(self) -> ServerInfo:
        server = await self._postgres.server()
        control = await in_thread(self._data_directory.control_file)
        refuse_unfit_server(server, self._take_from)
        if control.system_identifier != server.system_identifier:
            raise BackupFailed(
                f"{self._data_directory.path} is of database cluster {control.system_identifier}, "
                f"the server of {server.system_identifier}",
                hint="Mount the data volume of the server that PGHOST names, and set PGDATA to it.",
            )
        owner = await owner_by_backups(self._store)
        if owner is not None and owner != server.system_identifier:
            raise BackupFailed(
                f"the repository belongs to database cluster {owner}, this server is {server.system_identifier}",
                hint="Give this server a WALG_S3_PREFIX of its own, as after a new initdb or pg_upgrade.",
            )
        await refuse_other_key(self._store, self._objects)
        return server

    async def _begin(
        self, server: ServerInfo, started_at: datetime, start_lsn: int, kind: BackupKind, *, permanent: bool
    ) -> _Begun:
        control = await self._control_file_of(server, start_lsn)
        name = f"base_{segment_name(control.timeline, start_lsn, control.wal_segment_bytes)}"
        async for info in self._store.list(BACKUP_FOLDER + name):
            raise BackupFailed(
                f"the repository already holds {info.key}, which has the name of this base backup",
                hint="The primary has made no checkpoint since: run one there."
                if server.in_recovery
                else "Another server writes to this repository, or one was reset: give this one its own.",
            )
        links = await in_thread(tablespaces, self._data_directory.path)
        delta = await self._deltas.plan(kind, server, control, start_lsn, permanent=permanent)
        if delta is not None:
            name += f"_D_{delta.parent.backup.start_segment}"
        log.info("base backup started", backup_id=name, start_lsn=format_lsn(start_lsn))
        return _Begun(name, started_at, start_lsn, server, control, links, delta)

    def _open_content(self, begun: _Begun) -> OpenContent:
        rules = page_rules(begun.control, begun.start_lsn)
        whole = WholeFiles(rules).open
        return whole if begun.delta is None else begun.delta.opener(whole, rules, self._data_directory.path)

    async def _control_file_of(self, server: ServerInfo, start_lsn: int) -> ControlFile:
        """Return the control file; raise unless the checkpoint in it is the one that the server has just made.

        A clone of the volume has the right system identifier, but not this checkpoint. One that went on by itself may
        have a later one, as the server has if it has made others since: then what the server says between two looks at
        the file is between what they show. The primary and a standby may have the same.
        """
        control = await in_thread(self._data_directory.control_file)
        self._require_same_directory(control, server, start_lsn)
        if (control.state is ClusterState.IN_PRODUCTION) is server.in_recovery:
            raise self._not_the_servers(start_lsn)
        if control.redo_lsn > start_lsn:
            by_server = (await self._postgres.server()).redo_lsn
            if not control.redo_lsn <= by_server <= (await in_thread(self._data_directory.control_file)).redo_lsn:
                raise self._not_the_servers(start_lsn)
        return control

    def _require_same_directory(self, control: ControlFile, server: ServerInfo, start_lsn: int) -> None:
        """Raise if the control file that we see is of another cluster, or older than the server's checkpoint."""
        if control.system_identifier != server.system_identifier or control.redo_lsn < start_lsn:
            raise self._not_the_servers(start_lsn)

    def _not_the_servers(self, start_lsn: int) -> BackupFailed:
        return BackupFailed(
            f"{self._data_directory.path} does not show the server's checkpoint at {format_lsn(start_lsn)}: "
            "it is a copy of the server's data directory",
            hint="Mount the data volume of the server that PGHOST names, and set PGDATA to it.",
        )

    @asynccontextmanager
    async def _kept_alive(self, session: BackupSession) -> AsyncIterator[None]:
        """Ping the session meanwhile: losing it aborts the backup, which is to be known at once."""

        async def ping() -> None:
            while True:
                await self._clock.sleep(_PING_SECONDS)
                await session.ping()

        async with task_group() as group:
            pinging = group.create_task(ping(), name="backup session")
            yield
            pinging.cancel()

    async def _store_control_file(self, begun: _Begun, upload: PartUpload, record: BackupRecord) -> None:
        content = await in_thread(self._data_directory.control_file_content)
        self._require_same_directory(parse_control_file(content, google_crc32c.value), begun.server, begun.start_lsn)
        upload.totals.catalog_bytes += len(content)
        await self._store_small_tar("pg_control", {CONTROL_FILE: content}, begun, upload)
        record.add_control_file(content)

    async def _store_label(self, begun: _Begun, stop: BackupStop, upload: PartUpload, record: BackupRecord) -> None:
        members = {"backup_label": stop.backup_label, "tablespace_map": stop.tablespace_map}
        record.add_label_tar(await self._store_small_tar("backup_label", members, begun, upload), stop)

    async def _store_small_tar(self, stem: str, members: Mapping[str, bytes], begun: _Begun, upload: PartUpload) -> str:
        name = f"{stem}.tar{self._objects.extension}"
        body = await in_thread(small_tar, members, self._objects)
        await self._store.put(tar_folder(begun.name) + name, body)
        upload.count_tar(sum(len(content) for content in members.values()), len(body))
        return name

    async def _stop(self, session: BackupSession, begun: _Begun) -> BackupStop:
        stop = await session.stop()
        self._require_fitting_label(stop, begun)
        after = await self._postgres.server()
        if _identity(after) != _identity(begun.server):
            raise BackupFailed(
                "the server was restarted, promoted or replaced during the base backup", hint="Take another."
            )
        return stop

    def _require_fitting_label(self, stop: BackupStop, begun: _Begun) -> None:
        label = parse_backup_label(stop.backup_label.decode("utf-8", "replace"))
        expected = (begun.start_lsn, begun.name[5:29], begun.control.timeline)
        if (label.start_lsn, label.start_segment, label.timeline) != expected:
            raise BackupFailed(
                f"the backup label names {label.start_segment} on timeline {label.timeline}, the start was {expected}"
            )
        if set(parse_tablespace_map(os.fsdecode(stop.tablespace_map))) != set(begun.tablespaces):
            raise BackupFailed("a tablespace came or went just when the base backup started", hint="Take another.")

    async def _wait_for_wal(self, begun: _Begun, stop: BackupStop, report: ReportProgress) -> None:
        timeline, segment_bytes = begun.control.timeline, begun.control.wal_segment_bytes
        # pg_basebackup makes servers without it.
        has_history = await in_thread((self._data_directory.path / "pg_wal" / history_name(timeline)).exists)
        names = needed_wal_files(
            timeline, begun.start_lsn, stop.stop_lsn, segment_bytes, has_history=has_history,
            on_standby=begun.server.in_recovery,
        )  # fmt: skip

        def tell(archived: int) -> None:
            self._tell(report, "waiting for WAL", archived * segment_bytes, len(names) * segment_bytes)

        tell(0)
        await wait_until_archived(self._store, names, self._limits.wal_seconds, self._clock, tell)

    async def _store_sentinel(self, facts: BackupFacts) -> None:
        key, body = sentinel_key(facts.name), sentinel_document(facts)
        if await self._store.put_if_absent(key, body):
            return
        held = await self._store.get(key)  # an earlier attempt of ours may have been stored, its answer lost
        if held is None or held.body != body:
            raise BackupFailed(
                f"another base backup of the name {facts.name} was completed meanwhile",
                hint="Another server writes to this repository: give one of them its own.",
            )

    def _observe(self, facts: BackupFacts, totals: Totals) -> None:
        seconds = (self._clock.now() - facts.start_time).total_seconds()
        self._metrics.backup_last_success.set(facts.finish_time.timestamp())
        self._metrics.backup_seconds.set(seconds)
        self._metrics.backup_bytes.set(facts.size_bytes)
        self._metrics.backup_read_bytes.set(totals.read_bytes)
        self._metrics.backup_stored_bytes.set(facts.stored_bytes)
        log.info(
            "base backup finished",
            backup_id=facts.name,
            stop_lsn=format_lsn(facts.finish_lsn),
            seconds=round(seconds, 3),
            members=totals.members,
            tars=totals.tars,
            read_bytes=totals.read_bytes,
            size_bytes=facts.size_bytes,
            stored_bytes=facts.stored_bytes,
            corrupt_pages=facts.corrupt_pages,
        )

    async def _remove(self, name: str, sentinel: bytes | None) -> None:
        """Remove what was stored of a backup that is given up; `sentinel` is what we may have stored under its key.

        Bounded; what cannot be removed is no backup anyway.
        """
        try:
            async with asyncio.timeout(_CLEAN_UP_SECONDS):
                held = await self._store.get(sentinel_key(name))
                if held is not None and held.body != sentinel:
                    log.warning("another base backup of the same name is left alone", backup_id=name)
                    return
                await self._store.delete([sentinel_key(name)])
                keys = [info.key async for info in self._store.list(backup_folder(name))]
                await self._store.delete([key for key in keys if key != mark_key(name)])
        except (RepositoryError, TimeoutError) as error:
            log.warning("objects of an unfinished base backup remain", backup_id=name, reason=str(error))


def refuse_unfit_server(server: ServerInfo, take_from: BackupFrom) -> None:
    """Raise `BackupFailed` if a base backup of this server could not be restored, with what to change.

    A standby need not archive: the WAL of its backup comes from the primary.
    """
    if server.in_recovery:
        if take_from is BackupFrom.STANDBY:
            return
        raise BackupFailed(
            "the server is in recovery", hint="Ask the primary's agent, or set PITR_BACKUP_FROM=standby for all agents."
        )
    if server.archive_mode == "off" or server.wal_level == "minimal":
        raise BackupFailed(
            f"the server does not archive WAL: archive_mode={server.archive_mode}, wal_level={server.wal_level}",
            hint="Set archive_mode=on and wal_level=replica, set archive_command, and restart PostgreSQL.",
        )
    if not server.archive_command and not server.archive_library:
        raise BackupFailed("archive_command is empty", hint="Set archive_command to the archive hook.")


def _facts(begun: _Begun, stop: BackupStop, stopped_at: datetime, totals: Totals, *, permanent: bool) -> BackupFacts:
    return BackupFacts(
        name=begun.name,
        start_lsn=begun.start_lsn,
        finish_lsn=stop.stop_lsn,
        start_time=begun.started_at,
        finish_time=stopped_at,
        pg_version=begun.server.version_num,
        system_identifier=begun.server.system_identifier,
        size_bytes=totals.content_bytes,
        stored_bytes=totals.stored_bytes,
        catalog_bytes=totals.catalog_bytes,
        hostname=socket.gethostname(),
        data_directory=begun.server.data_directory,
        tablespaces=begun.tablespaces,
        delta=begun.delta.origin if begun.delta else None,
        permanent=permanent,
        corrupt_pages=totals.corrupt_pages,
        libc=begun.server.libc,
        config_outside=begun.server.config_outside,
    )


def _version_directory(control: ControlFile) -> str:
    return f"PG_{control.major_version}_{control.catalog_version}"


def _identity(server: ServerInfo) -> tuple[object, ...]:
    return server.system_identifier, server.version_num, server.timeline, server.started_at, server.in_recovery
