"""Whose repository this is: it belongs to one database cluster, and only that one's WAL goes in."""

import asyncio

from agent.errors import WalRefused
from agent.ports import ObjectStore
from agent.postgres.data_directory import DataDirectory
from agent.repository.key_check import refuse_other_key
from agent.repository.object_format import ObjectFormat
from agent.repository.owner import repository_owner
from agent.repository.wal_archive import WalArchive


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
