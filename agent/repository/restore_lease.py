"""A word to expiry, in the repository: this base backup is being restored.

An expiry may run in another pod, which knows of a restore by the repository alone. The lease is an object in the base
backup's own folder, which WAL-G ignores and removes with the backup. It is renewed as long as the restore runs, and
honoured by the store's own time: one that a killed restore leaves behind ends by itself.
"""

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import structlog

from agent.errors import RepositoryError
from agent.ports import Clock, ObjectStore
from agent.repository.keys import BACKUP_FOLDER, backup_folder
from agent.repository.renewed import renewed

LEASE_AGE = timedelta(hours=1)
"""A lease that was not renewed for so long is over."""

RENEW_SECONDS = 600.0
_NAME = "pitr_restore_"

log = structlog.get_logger()


def is_lease(key: str) -> bool:
    """Tell whether `key` is a lease's."""
    return key.rpartition("/")[2].startswith(_NAME)


async def leased(store: ObjectStore, now: datetime) -> set[str]:
    """Return the names of the base backups that are being restored at `now`, the store's time.

    Raises:
        RepositoryError: The repository could not be listed.
    """
    leases = [info async for info in store.list(BACKUP_FOLDER) if is_lease(info.key)]
    return {info.key.split("/")[1] for info in leases if info.modified_at > now - LEASE_AGE}


@asynccontextmanager
async def restore_lease(store: ObjectStore, backup: str, clock: Clock) -> AsyncIterator[None]:
    """Keep expiry from `backup`, what it builds on, and all WAL after it, inside the context.

    A restore whose credentials may only read goes on without, and says so.
    """
    key = f"{backup_folder(backup)}{_NAME}{secrets.token_hex(6)}.json"
    body = json.dumps({"backup": backup}).encode()
    try:
        await store.put(key, body)
    except RepositoryError as error:
        log.warning("expiry cannot be told of this restore", backup_id=backup, reason=error.one_line())
        yield
        return
    async with renewed(store, key, body, clock, RENEW_SECONDS, "restore lease"):
        yield
