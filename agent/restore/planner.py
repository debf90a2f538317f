"""Plans a restore: reads the catalog, the timeline histories and as much WAL as the rules ask for."""

from collections.abc import Sequence
from dataclasses import replace

import structlog

from agent.domain.catalog import Backup
from agent.domain.restore_plan import RestorePlan, plan_restore
from agent.domain.restore_target import RestoreTarget
from agent.errors import NoRestorePath
from agent.ports import ObjectStore
from agent.repository.backups import read_backup, read_catalog
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import list_wal

NEWEST = "LATEST"
"""The backup name that leaves the choice to the plan."""

log = structlog.get_logger()


async def plan_from_repository(
    store: ObjectStore,
    archive: WalArchive,
    target: RestoreTarget,
    backup_name: str = NEWEST,
    *,
    catalog: Sequence[Backup] | None = None,
) -> RestorePlan:
    """Return how `target` is reached with what the repository holds now. Nothing of a base backup is downloaded.

    Args:
        store: The repository.
        archive: Its WAL part.
        target: Where recovery is to stop.
        backup_name: The base backup to begin from; LATEST: the newest that can reach the target.
        catalog: The base backups that there are; None: to be read.

    Raises:
        NoRestorePath: It cannot be reached; the message says why.
        RepositoryError: The repository could not be read, or what had to be read of it is damaged: WAL, the named base
            backup, or, where no other one serves, one that others build on.
    """
    catalog = await read_catalog(store) if catalog is None else catalog
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
    wal = await list_wal(archive, catalog)
    if catalog and not wal.stored_bytes:
        raise NoRestorePath("the repository holds no WAL", hint="A base backup is of no use without the WAL beside it.")
    plan = await wal.index.follow(plan_restore(wal.held, target, None if backup_name == NEWEST else backup_name))
    wal_bytes = sum(wal.stored_bytes[name] for name in plan.segments)
    plan = replace(
        plan,
        download_bytes=wal_bytes + sum(backup.stored_bytes for backup in plan.chain),
        measured_rate=wal.measured_rate,
    )
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
