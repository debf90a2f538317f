"""What restores from a base backup measured, noted beside it.

So a restore in a pod of its own, which has nothing but the repository, knows how long the one before took.
"""

import asyncio
from collections.abc import Sequence

import structlog

from agent.domain.catalog import Backup
from agent.domain.restore_rates import RestoreRates
from agent.errors import RepositoryError, RepositoryUnavailable
from agent.ports import ObjectStore
from agent.repository.backup_note import BackupNote
from agent.repository.documents import Document
from agent.tasks import by_name

RESTORED = BackupNote("pitr_restored.json", "restore record")

WRITE_SECONDS = 30.0
_ASKED = 16  # base backups, one request each, at once

log = structlog.get_logger()


async def read_restore_rates(store: ObjectStore, catalog: Sequence[Backup]) -> list[RestoreRates]:
    """Return what the last restore from each of the newest base backups measured; drills restore the newest.

    catalog: All base backups, oldest first. A record that cannot be read is told and left out: a plan goes without it.
    """
    newest = [backup.name for backup in catalog[-_ASKED:]]
    found = await by_name(newest, lambda name: _read(store, name), at_once=_ASKED)
    return [rates for rates in found.values() if rates is not None]


async def _read(store: ObjectStore, backup: str) -> RestoreRates | None:
    try:
        return await RESTORED.read(store, backup, _parse)
    except RepositoryError as error:
        log.warning("restore record was not read", backup_id=backup, reason=error.one_line())
        return None


def _parse(document: Document) -> RestoreRates | None:
    measured_at = document.moment("measured_at")
    if measured_at is None:
        return None
    return RestoreRates(
        measured_at, document.whole("hydrate_bytes_per_second"), document.whole("replay_bytes_per_second")
    )


async def write_restore_rates(store: ObjectStore, backup: str, rates: RestoreRates) -> None:
    """Keep `rates`, unless the base backup is gone. Where nothing can be written soon, it is told and not kept.

    A restore that is complete does not wait until a store that went away comes back.
    """
    values = {
        "measured_at": rates.measured_at,
        "hydrate_bytes_per_second": None if rates.hydrate is None else round(rates.hydrate),
        "replay_bytes_per_second": None if rates.replay is None else round(rates.replay),
    }
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await RESTORED.write(store, backup, values)
    except TimeoutError:
        RESTORED.was_not_stored(backup, RepositoryUnavailable(f"the store did not take it in {WRITE_SECONDS:g} s"))
