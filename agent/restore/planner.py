"""Plans a restore: reads the catalog, the timeline histories and as much WAL as the rules ask for."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import structlog

from agent.domain.catalog import Backup
from agent.domain.restore_plan import Holdings, RestorePlan, Rules, plan_restore
from agent.domain.restore_target import RestoreTarget
from agent.domain.wal import WalFileKind, parse_segment_header, parse_segment_name
from agent.domain.wal_records import SegmentScan, scan_segment
from agent.errors import NoRestorePath, RepositoryCorrupt, RepositoryUnavailable
from agent.ports import ObjectStore
from agent.repository.backups import read_backup, read_catalog
from agent.repository.wal_archive import WalArchive
from agent.tasks import in_thread, task_group

NEWEST = "LATEST"
"""The backup name that leaves the choice to the plan."""

_KEPT_SCANS = 8  # the rules look at the end of the WAL more than once
_BUFFER_BYTES = 128 << 20  # a segment being scanned is held twice

log = structlog.get_logger()


async def plan_from_repository(
    store: ObjectStore, archive: WalArchive, target: RestoreTarget, backup_name: str = NEWEST
) -> RestorePlan:
    """Return how `target` is reached with what the repository holds now. Nothing of a base backup is downloaded.

    Args:
        store: The repository.
        archive: Its WAL part.
        target: Where recovery is to stop.
        backup_name: The base backup to begin from; LATEST: the newest that can reach the target.

    Raises:
        NoRestorePath: It cannot be reached; the message says why.
        RepositoryError: The repository could not be read, or what had to be read of it is damaged: WAL, the named base
            backup, or, where no other one serves, one that others build on.
    """
    catalog = await read_catalog(store)
    try:
        return await _plan(archive, catalog, target, backup_name)
    except NoRestorePath:
        await _require_sound(store, catalog, backup_name)
        raise


async def _require_sound(store: ObjectStore, catalog: Sequence[Backup], backup_name: str) -> None:
    """Raise `RepositoryCorrupt` if a base backup that was asked for, or is built on, was passed over as damaged."""
    if not catalog:
        await read_catalog(store, strict=True)
    wanted = {backup_name} - {NEWEST}
    parents = {parent for backup in catalog if (parent := backup.parent) is not None}
    for name in sorted((wanted | parents) - {backup.name for backup in catalog}):
        await read_backup(store, name)


async def _plan(archive: WalArchive, catalog: Sequence[Backup], target: RestoreTarget, backup_name: str) -> RestorePlan:
    stored = {item.name: item.size for item in await archive.list_files() if item.kind is WalFileKind.SEGMENT}
    if catalog and not stored:
        raise NoRestorePath("the repository holds no WAL", hint="A base backup is of no use without the WAL beside it.")
    scans = _Scans(archive, catalog)
    segment_bytes = await scans.segment_bytes(max(stored)) if stored else 0
    held = Holdings(
        backups=catalog,
        histories=await archive.histories(),
        segments=[name for name in stored if _is_segment(name, segment_bytes)],
        segment_bytes=segment_bytes,
    )
    plan = await _answered(plan_restore(held, target, None if backup_name == NEWEST else backup_name), scans)
    wal_bytes = sum(stored[name] for name in plan.segments)
    plan = replace(plan, download_bytes=wal_bytes + sum(backup.stored_bytes for backup in plan.chain))
    log.info(
        "restore planned",
        backup=plan.backup.name,
        timeline=plan.timeline,
        target=str(target),
        first_segment=plan.first_segment,
        last_segment=plan.last_segment,
        segments=len(plan.segments),
        download_bytes=plan.download_bytes,
        note=plan.note,
    )
    return plan


async def _answered(rules: Rules[RestorePlan], scans: "_Scans") -> RestorePlan:
    try:
        names = next(rules)
        while True:
            names = rules.send(await scans.of(names))
    except StopIteration as end:
        plan: RestorePlan = end.value
        return plan


def _is_segment(name: str, segment_bytes: int) -> bool:
    try:
        parse_segment_name(name, segment_bytes)
    except ValueError:
        return False
    return True


class _Scans:
    """Fetches and scans segments, a few at once; keeps the last few results."""

    def __init__(self, archive: WalArchive, catalog: Sequence[Backup]) -> None:
        self._archive = archive
        self._system_identifier = catalog[-1].system_identifier if catalog else None
        self._kept: OrderedDict[str, SegmentScan] = OrderedDict()
        self._at_once = asyncio.Semaphore(1)

    async def segment_bytes(self, name: str) -> int:
        """Return `wal_segment_size` as the archived segment `name` says, and scan up to a buffer's worth at once."""
        segment_bytes = parse_segment_header(await self._fetch(name)).segment_bytes
        self._at_once = asyncio.Semaphore(max(1, _BUFFER_BYTES // (2 * segment_bytes)))
        return segment_bytes

    async def of(self, names: Sequence[str]) -> list[SegmentScan]:
        async with task_group() as group:
            tasks = [group.create_task(self._scan(name), name=f"scan {name}") for name in names]
        return [task.result() for task in tasks]

    async def _scan(self, name: str) -> SegmentScan:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        async with self._at_once:
            content = await self._fetch(name)
            try:
                scan = await in_thread(scan_segment, content)
            except ValueError as error:
                raise RepositoryCorrupt(f'"{name}" in the repository is not a WAL segment: {error}') from error
        self._kept[name] = scan
        if len(self._kept) > _KEPT_SCANS:
            self._kept.popitem(last=False)
        return scan

    async def _fetch(self, name: str) -> bytes:
        content = await self._archive.fetch(name, self._system_identifier)
        if content is None:
            raise RepositoryUnavailable(
                f'WAL segment "{name}" was removed from the repository while the restore was planned',
                hint="Plan again; if an expiry is running, let it end first.",
            )
        return content
