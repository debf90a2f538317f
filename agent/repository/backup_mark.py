"""A word to the other servers of the cluster, in the repository: this base backup is being taken.

Only where standbys may take base backups: the agents of different servers have nothing else in common. The mark is an
object in the base backup's own folder, which WAL-G ignores. It is renewed as long as the backup runs, and told by the
store's own time: one that a killed agent leaves behind ends by itself.
"""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from agent.errors import BackupElsewhere
from agent.ports import Clock, ObjectInfo, ObjectStore
from agent.repository.keys import BACKUP_FOLDER, backup_folder
from agent.repository.renewed import renewed

MARK_AGE = timedelta(minutes=5)
"""A mark that was not renewed for so long is over. The clocks of the servers and the store may differ by less."""

RENEW_SECONDS = 60.0
_NAME = "pitr_backup_in_progress"


def mark_key(backup: str) -> str:
    """Return the key of the mark of `backup`."""
    return backup_folder(backup) + _NAME


@asynccontextmanager
async def backup_mark(store: ObjectStore, backup: str, clock: Clock) -> AsyncIterator[None]:
    """Tell the other servers, inside the context, that `backup` is being taken, or that what is left of it is removed.

    It is told first and looked second: of two that begin together at least one sees the other and gives up. Two
    standbys may begin at the same restartpoint, and so with the same name: one of them alone stores its mark.

    Raises:
        BackupElsewhere: Another server is taking one; this name may be its.
        RepositoryError: The mark could not be stored, or the others' not be looked for.
    """
    key, token = mark_key(backup), secrets.token_hex(8).encode()
    if not await store.put_if_absent(key, token):
        held = await store.get(key)  # an earlier attempt of ours may have been stored, its answer lost
        if held is None or held.body != token:
            raise _elsewhere(backup)
    async with renewed(store, key, token, clock, RENEW_SECONDS, "base backup mark"):
        await refuse_while_others(store, clock.now(), but=backup)
        yield


async def refuse_while_others(store: ObjectStore, now: datetime, *, but: str = "") -> None:
    """Raise `BackupElsewhere` while a base backup other than `but` is being taken.

    Two or three requests for each base backup of the repository.
    """
    after = ""
    while (info := await _first(store, after)) is not None:
        backup = info.key[len(BACKUP_FOLDER) :].partition("/")[0]
        after = backup_folder(backup) + "~"  # behind all that is in the folder
        mark = await _mark_in(store, info, backup)
        if backup != but and mark is not None and now - mark.modified_at < MARK_AGE:
            raise _elsewhere(backup)


def _elsewhere(backup: str) -> BackupElsewhere:
    return BackupElsewhere(f"another server is taking base backup {backup}", hint="Wait until it has ended.")


async def _first(store: ObjectStore, after: str) -> ObjectInfo | None:
    async for info in store.list(BACKUP_FOLDER, after=after):
        return info
    return None


async def _mark_in(store: ObjectStore, first: ObjectInfo, backup: str) -> ObjectInfo | None:
    is_folder = first.key.startswith(backup_folder(backup))
    return await store.head(mark_key(backup)) if is_folder else None
