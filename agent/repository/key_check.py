"""Whether the settings have the key that a repository is encrypted with: asked before it is added to or restored from.

A repository with objects of two keys, or encrypted in part, cannot be restored from with any settings.
"""

from collections.abc import AsyncIterator
from itertools import count

from agent.errors import RepositoryCorrupt, RepositoryRefused, WrongKey
from agent.ports import ObjectStore
from agent.repository.keys import WAL_FOLDER
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import parse_wal_object
from agent.tasks import in_thread

_PROBES = 3
_ENOUGH_BYTES = 64 << 10  # the first chunk shows the key


async def refuse_other_key(store: ObjectStore, objects: ObjectFormat) -> None:
    """Raise if the oldest few WAL files are encrypted otherwise than `objects`: with another key, or only one of both.

    One that begins well is proof enough, so that a damaged one, or one in cold storage, does not stop archiving. Of
    it 1 MiB is read. Where no key is set, an object that was encrypted without compression is not told.

    Raises:
        WrongKey: None begins well, and one shows that it is the key.
        RepositoryError: The repository could not be asked.
    """
    wrong: WrongKey | None = None
    async for key in _oldest_wal_files(store):
        try:
            if await _begins_well(store, objects, key):
                return
        except WrongKey as error:
            wrong = wrong or error
        except (RepositoryCorrupt, RepositoryRefused):
            continue
    if wrong is not None:
        raise wrong


async def _oldest_wal_files(store: ObjectStore) -> AsyncIterator[str]:
    found = count(1)
    async for info in store.list(WAL_FOLDER):
        if parse_wal_object(info) is not None:
            yield info.key
            if next(found) == _PROBES:
                return


async def _begins_well(store: ObjectStore, objects: ObjectFormat, key: str) -> bool:
    decoder = objects.decoder(key, lambda _piece: None)
    async with store.open(key) as opened:
        if opened is None:  # expired meanwhile
            return False
        async for piece in opened:
            await in_thread(decoder.take, piece)
            if len(piece) >= _ENOUGH_BYTES:
                return True
    await in_thread(decoder.finish)
    return True
