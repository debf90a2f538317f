"""What an operator does to one base backup: pin, unpin, delete.

Pinned is what `metadata.json` says, as for WAL-G; the sentinel is never rewritten, because its age orders the catalog.
"""

import json
from collections.abc import Sequence

from agent.domain.catalog import Backup, ancestors
from agent.errors import ConfigError, RepositoryCorrupt
from agent.expire.removal import Removal, Remover
from agent.ports import Clock, ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.keys import metadata_key
from agent.repository.survey import survey_repository
from agent.repository.wal_archive import WalArchive


async def pin(store: ObjectStore, name: str) -> list[str]:
    """Pin the base backup and all that it builds on; return the names that were not pinned before.

    Raises:
        ConfigError: There is no such backup.
        RepositoryError: Its metadata could not be read or written.
    """
    catalog = await read_catalog(store)
    backup = find_backup(catalog, name)
    changed: list[str] = []
    for each in [*reversed(ancestors(backup, {each.name: each for each in catalog})), backup]:
        if not each.permanent:
            await _mark(store, each.name, permanent=True)
            changed.append(each.name)
    return changed


async def unpin(store: ObjectStore, name: str) -> list[str]:
    """Unpin the base backup; return its name, or nothing if it was not pinned.

    Raises:
        ConfigError: There is no such backup, or a pinned one builds on it.
        RepositoryError: Its metadata could not be read or written.
    """
    catalog = await read_catalog(store)
    backup = find_backup(catalog, name)
    children = [each.name for each in catalog if each.parent == name and each.permanent]
    if children:
        raise ConfigError(f"{children[0]}, which is pinned, builds on {name}", hint=f"Unpin {children[0]} first.")
    if not backup.permanent:
        return []
    await _mark(store, name, permanent=False)
    return [name]


async def delete(
    store: ObjectStore, archive: WalArchive, clock: Clock, name: str, *, with_dependents: bool
) -> tuple[list[str], Removal]:
    """Remove one base backup, and with `with_dependents` all that build on it; no WAL, which the next expiry removes.

    Returns the names of the backups that are gone, and what was removed.

    Raises:
        ConfigError: There is no such backup, others build on it, it is pinned, or it is in use.
        RepositoryError: The repository could not be read, or the store failed half-way: call it again, or expire.
    """
    inventory = (await survey_repository(store, archive, clock)).inventory
    target = find_backup(inventory.backups, name)
    by_name = {each.name: each for each in inventory.backups}
    going = [each for each in inventory.backups if each == target or target in ancestors(each, by_name)]
    if len(going) > 1 and not with_dependents:
        raise ConfigError(
            f"{going[-1].name} builds on {name}",
            hint=f"Give --with-dependents to delete all {len(going)}, or delete the deltas first.",
        )
    for backup in going:
        if backup.permanent:
            raise ConfigError(f"{backup.name} is pinned", hint=f"pitr backup unpin {backup.name}, if it is to go.")
        if backup.name in inventory.restoring:
            raise ConfigError(f"{backup.name} is being restored", hint="Wait until the restore has ended.")
        if inventory.is_built_on(backup):
            raise ConfigError(f"a base backup in progress builds on {backup.name}", hint="Wait until it has ended.")
    remover, removal = Remover(store), Removal()
    gone = await remover.sentinels(going, removal)
    for each in gone:
        amount = await remover.folder(each, removal)
        removal.backups.add(amount.objects, amount.stored_bytes)
    return gone, removal


def find_backup(catalog: Sequence[Backup], name: str) -> Backup:
    """Return the base backup `name`, or raise `ConfigError`."""
    for backup in catalog:
        if backup.name == name:
            return backup
    raise ConfigError(f"there is no base backup {name}", hint="`pitr backup list` shows what there is.")


async def _mark(store: ObjectStore, name: str, *, permanent: bool) -> None:
    key = metadata_key(name)
    stored = await store.get(key)
    try:
        values = json.loads(stored.body) if stored is not None else None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RepositoryCorrupt(
            f"{key} is absent or damaged, and says what is pinned", hint="Put an intact copy back into the repository."
        )
    body = json.dumps({**values, "is_permanent": permanent}, separators=(",", ":"), ensure_ascii=False)
    await store.put(key, body.encode())
