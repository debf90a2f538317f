"""What restores from a base backup measured, kept in its folder, which WAL-G ignores and removes with the backup.

So a restore in a pod of its own, which has nothing but the repository, knows how long the one before took.
"""

import json
from collections.abc import Sequence

import structlog

from agent.domain.catalog import Backup
from agent.domain.restore_rates import RestoreRates
from agent.domain.restore_target import format_time
from agent.errors import RepositoryError
from agent.ports import ObjectStore
from agent.repository.documents import read_document
from agent.repository.keys import backup_folder, sentinel_key
from agent.tasks import by_name

_MAX_BYTES = 64 << 10
_ASKED = 16  # base backups, one request each, at once

log = structlog.get_logger()


def restore_record_key(backup: str) -> str:
    """Key of the record of the base backup `backup`."""
    return f"{backup_folder(backup)}pitr_restored.json"


async def read_restore_rates(store: ObjectStore, catalog: Sequence[Backup]) -> list[RestoreRates]:
    """Return what the last restore from each of the newest base backups measured; drills restore the newest.

    catalog: All base backups, oldest first. A record that cannot be read is told and left out: a plan goes without it.
    """
    newest = [backup.name for backup in catalog[-_ASKED:]]
    found = await by_name(newest, lambda name: _read(store, name), at_once=_ASKED)
    return [rates for rates in found.values() if rates is not None]


async def _read(store: ObjectStore, backup: str) -> RestoreRates | None:
    try:
        document = await read_document(store, restore_record_key(backup), _MAX_BYTES)
        measured_at = None if document is None else document.moment("measured_at")
        if document is None or measured_at is None:
            return None
        return RestoreRates(
            measured_at, document.whole("hydrate_bytes_per_second"), document.whole("replay_bytes_per_second")
        )
    except RepositoryError as error:
        log.warning("record of a restore was not read", backup_id=backup, reason=error.one_line())
        return None


async def write_restore_rates(store: ObjectStore, backup: str, rates: RestoreRates) -> None:
    """Keep `rates`, unless the base backup is gone. Where nothing may be written, it is told and not kept."""
    values = {
        "measured_at": format_time(rates.measured_at),
        "hydrate_bytes_per_second": None if rates.hydrate is None else round(rates.hydrate),
        "replay_bytes_per_second": None if rates.replay is None else round(rates.replay),
    }
    try:
        if await store.head(sentinel_key(backup)) is not None:
            await store.put(restore_record_key(backup), json.dumps(values).encode())
    except RepositoryError as error:
        log.warning("rates of the restore were not stored", backup_id=backup, reason=error.one_line())
