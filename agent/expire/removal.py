"""Removing objects in the order that is safe at every step: see the invariants of `expiry`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from agent.domain.catalog import Backup
from agent.errors import RepositoryError, RepositoryRefused
from agent.ports import ObjectInfo, ObjectStore
from agent.repository.keys import backup_folder, sentinel_key

KEYS_AT_ONCE = 1000

log = structlog.get_logger()


@dataclass(slots=True)
class Amount:
    """Objects and their bytes as stored."""

    objects: int = 0
    stored_bytes: int = 0

    def add(self, objects: int, stored_bytes: int) -> None:
        """Count these, too."""
        self.objects += objects
        self.stored_bytes += stored_bytes


@dataclass(slots=True)
class Removal:
    """What was removed. failed: keys that could not be, and why. keeps_versions: the bucket keeps the bytes."""

    backups: Amount = field(default_factory=Amount)
    wal: Amount = field(default_factory=Amount)
    failed: dict[str, RepositoryError] = field(default_factory=dict)
    keeps_versions: bool = False

    def raise_if_incomplete(self) -> None:
        """Raise `RepositoryRefused` if something could not be removed; what, is in the log."""
        if self.failed:
            key, error = next(iter(self.failed.items()))
            others = f" and {len(self.failed) - 1} more objects" if len(self.failed) > 1 else ""
            raise RepositoryRefused(
                f"{key}{others} could not be removed: {error.message}",
                hint=error.hint or "Lift the object lock, or wait for its end; the next expiry tries again.",
            )


class Remover:
    """Removes base backups and other objects; what of that cannot be removed is noted in a `Removal`."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def sentinels(self, going: Sequence[Backup], removal: Removal) -> list[str]:
        """Remove the sentinels of `going`, children first; return the names of those that are gone.

        One that cannot be removed keeps the backup, and with it what it builds on.
        """
        gone: list[str] = []
        still_needed: set[str | None] = set()
        for depth in sorted({backup.delta_count for backup in going}, reverse=True):
            level = [b for b in going if b.delta_count == depth and b.name not in still_needed]
            deletion = await self._store.delete_many([sentinel_key(backup.name) for backup in level])
            removal.failed |= deletion.failed
            removal.keeps_versions |= deletion.keeps_versions
            stuck = [backup for backup in level if sentinel_key(backup.name) in deletion.failed]
            still_needed |= {backup.parent for backup in [*stuck, *(b for b in going if b.name in still_needed)]}
            gone += [backup.name for backup in level if backup not in stuck]
        return gone

    async def folder(self, name: str, removal: Removal, *, older_than: datetime | None = None) -> Amount:
        """Remove the folder of a backup that has no sentinel; return how much that was.

        older_than: leave it, if something was added to it since: somebody is taking that backup.
        """
        infos = [info async for info in self._store.list(backup_folder(name))]
        if older_than is not None and any(info.modified_at > older_than for info in infos):
            return Amount()
        if await self._store.head(sentinel_key(name)) is not None:
            return Amount()
        amount = await self.objects(infos, removal)
        log.info("base backup removed", backup_id=name, objects=amount.objects, was_incomplete=older_than is not None)
        return amount

    async def objects(self, infos: Sequence[ObjectInfo], removal: Removal) -> Amount:
        """Remove objects; return how much that was."""
        removed = Amount()
        for start in range(0, len(infos), KEYS_AT_ONCE):
            batch = infos[start : start + KEYS_AT_ONCE]
            deletion = await self._store.delete_many([info.key for info in batch])
            removal.failed |= deletion.failed
            removal.keeps_versions |= deletion.keeps_versions
            gone = [info for info in batch if info.key not in deletion.failed]
            removed.add(len(gone), sum(info.size for info in gone))
        return removed
