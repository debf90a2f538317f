"""Whether the settings have the key that a repository is encrypted with: asked before it is added to or restored from.

A repository with objects of two keys, or encrypted in part, cannot be restored from with any settings.
"""

from collections.abc import AsyncIterator
from itertools import count

from agent.domain.wal import LONG_HEADER_BYTES, WalFileKind, is_segment_size, parse_segment_header
from agent.errors import RepositoryCorrupt, RepositoryRefused, WrongKey
from agent.ports import ObjectStore
from agent.repository.keys import WAL_FOLDER
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalObject, parse_wal_object
from agent.tasks import in_thread

_PROBES = 3
_ENOUGH_BYTES = 64 << 10  # the first chunk shows the key


async def refuse_other_key(store: ObjectStore, objects: ObjectFormat) -> None:
    """Raise if the oldest few WAL files are encrypted otherwise than `objects`: with another key, or only one of both.

    One that begins well is proof enough, so that a damaged one, or one in cold storage, does not stop archiving. Of
    it 1 MiB is read.

    Raises:
        WrongKey: None begins well, and one shows that it is the key.
        RepositoryError: The repository could not be asked.
    """
    wrong: WrongKey | None = None
    async for wal in _oldest_wal_files(store):
        try:
            if await _begins_well(store, objects, wal):
                return
        except WrongKey as error:
            wrong = wrong or error
        except (RepositoryCorrupt, RepositoryRefused):
            continue
    if wrong is not None:
        raise wrong


async def _oldest_wal_files(store: ObjectStore) -> AsyncIterator[WalObject]:
    found = count(1)
    async for info in store.list(WAL_FOLDER):
        if (wal := parse_wal_object(info)) is not None:
            yield wal
            if next(found) == _PROBES:
                return


async def _begins_well(store: ObjectStore, objects: ObjectFormat, wal: WalObject) -> bool:
    start = bytearray()
    decoder = objects.decoder(wal.key, lambda piece: start.extend(piece[: LONG_HEADER_BYTES - len(start)]))
    async with store.open(wal.key) as opened:
        if opened is None:  # expired meanwhile
            return False
        async for piece in opened:
            await in_thread(decoder.take, piece)
            if len(piece) >= _ENOUGH_BYTES:
                break
        else:
            await in_thread(decoder.finish)
    # Neither a cipher nor a codec has looked at what is stored as it is.
    if wal.kind is WalFileKind.SEGMENT and wal.key.endswith(wal.name) and not _is_wal(start):
        raise WrongKey(
            f"{wal.key} does not begin as WAL does: it is encrypted, but no key is set, or it is damaged",
            hint="Set WALG_LIBSODIUM_KEY (or _KEY_PATH) and WALG_LIBSODIUM_KEY_TRANSFORM as when it was stored.",
        )
    return True


def _is_wal(start: bytearray) -> bool:
    try:
        return is_segment_size(parse_segment_header(bytes(start)).segment_bytes)
    except ValueError:
        return False
