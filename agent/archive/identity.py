"""Whose repository this is: it belongs to one database cluster, and only that one's WAL goes in."""

import asyncio

import structlog

from agent.domain.wal import WalFileKind, parse_segment_header
from agent.errors import RepositoryCorrupt, WalRefused
from agent.ports import ObjectStore
from agent.postgres.data_directory import DataDirectory
from agent.repository.backups import owner_by_backups
from agent.repository.key_check import refuse_other_key
from agent.repository.keys import WAL_FOLDER
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive, parse_wal_object

log = structlog.get_logger()


async def repository_owner(store: ObjectStore, archive: WalArchive) -> int | None:
    """Return the system identifier of the database cluster whose backups and WAL are stored, or None if empty.

    Backups are asked first: their sentinels say it. Then the oldest WAL segments. What is damaged is passed over: that
    must not stop archiving.
    """
    owner = await owner_by_backups(store)
    if owner is not None:
        return owner
    async for info in store.list(WAL_FOLDER):
        item = parse_wal_object(info)
        if item is None or item.kind is not WalFileKind.SEGMENT:
            continue
        try:
            content = await archive.fetch(item.name)
        except RepositoryCorrupt as error:
            log.warning("wal segment cannot be understood", wal_file=item.name, reason=error.one_line())
            continue
        if content is not None:
            return parse_segment_header(content).system_identifier
    return None


class IdentityGuard:
    """Compares system identifier and encryption key with the repository's, once, before anything is stored.

    foreign: why nothing may be stored, while the repository is another database cluster's.
    """

    def __init__(
        self, store: ObjectStore, objects: ObjectFormat, archive: WalArchive, data_directory: DataDirectory
    ) -> None:
        self._store = store
        self._objects = objects
        self._archive = archive
        self._data_directory = data_directory
        self.foreign: str | None = None
        self._known: int | None = None
        self._lock = asyncio.Lock()

    async def system_identifier(self) -> int:
        """Return the system identifier that data directory and repository share.

        Raises:
            WalRefused: The repository belongs to another database cluster.
            WrongKey: The repository is encrypted with another key than the settings have, or only one of both is.
            ConfigError: There is no readable data directory.
            RepositoryError: The repository could not be asked.
        """
        async with self._lock:
            if self._known is None:
                ours = (await asyncio.to_thread(self._data_directory.control_file)).system_identifier
                owner = await repository_owner(self._store, self._archive)
                if owner is not None and owner != ours:
                    self.foreign = f"the repository belongs to database cluster {owner}, this server is {ours}"
                    raise WalRefused(
                        self.foreign,
                        hint="Give this server a WALG_S3_PREFIX of its own, as after a new initdb or pg_upgrade.",
                    )
                await refuse_other_key(self._store, self._objects)
                self._known, self.foreign = ours, None
            return self._known
