"""Decides whether the next base backup is a delta, and on what.

Whatever keeps a delta from being taken gives a full base backup and a line in the log: a chain is never continued on a
parent that is gone, damaged or of another history. An unreachable repository is an error, as for every backup.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import structlog

from agent.domain.catalog import Backup
from agent.domain.control_file import ControlFile, parse_control_file
from agent.domain.delta_parent import BackupKind, DeltaParent, DeltaPolicy, NewBackup, NoParent, choose_parent
from agent.domain.lsn import format_lsn
from agent.domain.page import PAGE_BYTES
from agent.domain.timeline import path_to
from agent.errors import BackupFailed, PostgresError, RepositoryCorrupt
from agent.ports import NoSummaries, ObjectStore, Postgres, ServerInfo
from agent.postgres.data_directory import DataDirectory
from agent.postgres.file_content import OpenContent
from agent.postgres.page_check import PageRules
from agent.repository.backup_control_file import read_backup_control_file
from agent.repository.backups import DeltaOrigin, list_tars, read_catalog
from agent.repository.keys import manifest_key, sentinel_key
from agent.repository.object_format import ObjectFormat
from agent.repository.parent_files import ParentFiles, read_parent_files
from agent.repository.verification_record import read_records
from agent.tasks import in_thread

if TYPE_CHECKING:
    from agent.backup.delta_files import DeltaFiles
    from agent.domain.wal_summaries import ChangedBlocks

log = structlog.get_logger()


class Delta:
    """A delta to be taken: what it builds on, and how changed blocks are found (None: by the pages' LSNs)."""

    def __init__(
        self,
        parent: DeltaParent,
        files: ParentFiles,
        changed: "ChangedBlocks | None",
        blocks_per_segment: int,
        *,
        hints_are_logged: bool,
    ) -> None:
        self.parent = parent
        self._files = files
        self._changed = changed
        self._blocks_per_segment = blocks_per_segment
        self._hints_are_logged = hints_are_logged
        self._opener: DeltaFiles | None = None

    @property
    def origin(self) -> DeltaOrigin:
        """What the sentinel says of it."""
        backup = self.parent.backup
        return DeltaOrigin(backup.name, backup.start_lsn, self.parent.chain[-1], self.parent.count)

    def opener(self, whole: OpenContent, rules: PageRules | None, data_directory: Path) -> OpenContent:
        """Return what opens the files of `data_directory`; `whole` opens those that are stored whole.

        Imports numpy: call it in a thread.
        """
        from agent.backup.delta_files import DeltaFiles, by_page_lsn, by_wal_summaries

        backup, changed = self.parent.backup, self._changed
        segment = self._blocks_per_segment
        find = (
            by_page_lsn(backup.start_lsn, segment, hints_are_logged=self._hints_are_logged)
            if changed is None
            else by_wal_summaries(changed, segment)
        )
        started_ns = int(backup.start_time.timestamp() * 10**6) * 1000
        self._opener = DeltaFiles(self._files, started_ns, find, whole, rules, data_directory)
        return self._opener.open

    def log_counts(self, name: str) -> None:
        """Log what the finished delta `name` holds."""
        if self._opener is not None:
            log.info("delta finished", backup_id=name, parent=self.parent.backup.name, **asdict(self._opener.counts))


class DeltaPlanner:
    """Chooses the parent of the next base backup of one server, by `policy`."""

    def __init__(
        self,
        store: ObjectStore,
        objects: ObjectFormat,
        postgres: Postgres,
        data_directory: DataDirectory,
        policy: DeltaPolicy,
    ) -> None:
        self._store = store
        self._objects = objects
        self._postgres = postgres
        self._data_directory = data_directory
        self._policy = policy

    async def plan(
        self, kind: BackupKind, server: ServerInfo, control: ControlFile, start_lsn: int, *, permanent: bool = False
    ) -> Delta | None:
        """Return the delta to be taken by a backup that has just started at `start_lsn`; None: take a full one.

        Raises:
            BackupFailed: `kind` asks for a delta, and none can be taken.
            RepositoryError: The repository could not be read.
        """
        if kind is BackupKind.FULL or (kind is BackupKind.AUTO and self._policy.max_steps == 0):
            return None
        history = await in_thread(self._data_directory.timeline_history, control.timeline)
        new = NewBackup(
            start_lsn, path_to(control.timeline, history), server.system_identifier, server.version_num, permanent
        )
        try:
            catalog = await read_catalog(self._store)
            parent = choose_parent(kind, catalog, self._policy, new)
            if isinstance(parent, DeltaParent):
                await self._require_undamaged([backup for backup in catalog if backup.name in parent.chain])
                await self._require_same_pages(parent.backup.name, control)
                await self._require_own(parent.chain)
                files = await self._files(parent)
        except RepositoryCorrupt as error:
            parent = NoParent(error.message)
        if isinstance(parent, NoParent):
            _tell(kind, parent)
            return None
        return Delta(
            parent,
            files,
            await self._changed(parent, new),
            control.relation_segment_blocks,
            hints_are_logged=_hints_are_logged(server, control, parent.backup.start_time),
        )

    async def require_parents(self, delta: Delta) -> None:
        """Return if all that `delta` builds on is still there: retention elsewhere may not have known of it.

        Raises:
            BackupFailed: One is gone.
            RepositoryError: That could not be found out.
        """
        for name in delta.parent.chain:
            if await self._store.head(sentinel_key(name)) is None:
                raise BackupFailed(
                    f"base backup {name}, which the delta builds on, was deleted meanwhile",
                    hint="Take another: it will be a full one, or build on what is left.",
                )

    async def _require_undamaged(self, chain: Sequence[Backup]) -> None:
        """Return if nothing was found when the backups were read back, and their tars are all there by their bytes."""
        for name, record in (await read_records(self._store, [backup.name for backup in chain])).items():
            if record.known_problems:
                raise RepositoryCorrupt(f"base backup {name} is damaged: {record.known_problems[0]}")
        for backup in chain:
            stored = sum(tar.size for tar in await list_tars(self._store, backup.name))
            if stored < backup.stored_bytes:
                told = f"its tars have {stored} bytes, {backup.stored_bytes} were stored"
                raise RepositoryCorrupt(f"base backup {backup.name} is damaged: {told}")

    async def _require_own(self, chain: Sequence[str]) -> None:
        """WAL-G finds changed pages by their LSNs alone, see `visibility`: what its deltas lack, ours would, too.

        Whether hints were logged all the time between two of `chain` nobody can say now, unless pages had checksums.
        """
        for delta in chain[:-1]:
            if await self._store.head(manifest_key(delta)) is None:
                for name in chain:
                    if not (await self._control_file(name)).data_checksums:
                        raise RepositoryCorrupt(
                            f"base backup {delta} is a delta of WAL-G's, and without data checksums it may lack pages "
                            "that VACUUM marked all-visible"
                        )

    async def _control_file(self, name: str) -> ControlFile:
        content = await read_backup_control_file(self._store, self._objects, name)
        try:
            return parse_control_file(content, google_crc32c.value)
        except ValueError as error:
            raise RepositoryCorrupt(f"base backup {name}: {error}") from error

    async def _require_same_pages(self, name: str, control: ControlFile) -> None:
        before = await self._control_file(name)
        for what, is_same in (
            ("its data directory was made by another version", before.catalog_version == control.catalog_version),
            ("pages have another size", before.block_bytes == control.block_bytes == PAGE_BYTES),
            # Pages get their checksums without WAL, and the LSN stays.
            ("data checksums were switched since", before.data_checksums == control.data_checksums),
        ):
            if not is_same:
                raise RepositoryCorrupt(f"base backup {name} cannot be its parent: {what}")

    async def _files(self, parent: DeltaParent) -> ParentFiles:
        name = parent.backup.name
        files = await read_parent_files(self._store, name)
        if files is None or "/PG_VERSION" not in files:
            raise RepositoryCorrupt(f"base backup {name} has no list of its files, as WAL-G's local backups have")
        return files

    async def _changed(self, parent: DeltaParent, new: NewBackup) -> "ChangedBlocks | None":
        start_lsn = parent.backup.start_lsn
        try:
            changed = await self._postgres.changed_blocks(new.path, start_lsn, new.start_lsn)
        except PostgresError as error:
            changed = NoSummaries(error.message)
        if isinstance(changed, NoSummaries):
            log.info("changed blocks are found by reading all pages", reason=changed.reason)
            return None
        log.info("changed blocks are known from WAL summaries", since=format_lsn(start_lsn), blocks=len(changed))
        return changed


def _hints_are_logged(server: ServerInfo, control: ControlFile, since: datetime) -> bool:
    """Tell whether every hint that `server` has set in a page since the time `since` gave the page a new LSN.

    `wal_log_hints` may have been another before the server was started. A standby goes by its own, where pg_control has
    the primary's. Source: XLogHintBitIsNeeded() in PostgreSQL's xlog.h, heap_xlog_visible().
    """
    return control.data_checksums or (server.wal_log_hints and server.started_at < since)


def _tell(kind: BackupKind, parent: NoParent) -> None:
    if kind is BackupKind.DELTA:
        raise BackupFailed(f"no delta can be taken: {parent.reason}", hint="Take a full one: pitr backup now --full")
    log.info("a full base backup is taken instead of a delta", reason=parent.reason)
