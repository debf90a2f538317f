"""Tablespaces that replay makes: each at its literal path, among the files of the original server if that is here.

Source: tblspc_redo() in PostgreSQL's tablespace.c. No setting maps them.
"""

from contextlib import suppress
from pathlib import Path

from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import TargetKind
from agent.domain.wal_search import tablespaces_made
from agent.errors import BackupFailed, ConfigError
from agent.ports import ObjectStore
from agent.postgres.data_files import tablespaces
from agent.repository.backups import read_sentinel
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import WalIndex
from agent.settings import Settings
from agent.tasks import in_thread


async def require_no_harm(store: ObjectStore, archive: WalArchive, settings: Settings, plan: RestorePlan) -> None:
    """Return if replay writes into no other server's tablespace.

    A drill may make none at all. Any other restore is looked at where the data directory that was backed up is here,
    too, and has tablespaces that the base backup does not have. All the WAL of the plan is read for it then.

    Raises:
        ConfigError: It does.
        RepositoryError: The repository could not be read.
    """
    if settings.is_drill:
        for directory in await _made(archive, plan):
            raise ConfigError(
                f"a tablespace in {directory} was made after base backup {plan.backup.name}: replay makes it there",
                hint="Take a base backup, then drill.",
            )
        return
    sentinel = await read_sentinel(store, plan.backup.name)
    original = Path(sentinel.data_directory or "/nonexistent")
    links = await in_thread(_links, original) if original != settings.require_data_directory() else {}
    theirs = {directory for oid, directory in links.items() if oid not in sentinel.tablespaces}
    if theirs and (used := theirs.intersection(await _made(archive, plan))):
        raise ConfigError(
            f"a tablespace in {min(used)} was made after base backup {plan.backup.name}, and is a part of {original}: "
            "replay would write the past into it",
            hint="Restore on another machine, or where that directory cannot be seen.",
        )


def _links(data_directory: Path) -> dict[int, str]:
    """Return the tablespaces of the server in `data_directory`, OID to directory; none if they cannot be looked at."""
    with suppress(BackupFailed):
        return tablespaces(data_directory)
    return {}


async def _made(archive: WalArchive, plan: RestorePlan) -> list[str]:
    target = plan.effective_target
    until = plan.backup.finish_lsn if target.kind is TargetKind.IMMEDIATE else plan.stop_lsn
    inclusive = target.kind is TargetKind.LSN and target.inclusive
    index = WalIndex(archive, plan.backup.system_identifier, plan.segment_bytes)
    until = 1 << 64 if until is None else until
    return await index.follow(tablespaces_made(plan.segments, plan.backup.start_lsn, until, inclusive=inclusive))
