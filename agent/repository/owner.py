"""Whose repository it is, from what is stored in it."""

import structlog

from agent.domain.wal import WalFileKind
from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backups import owner_by_backups
from agent.repository.keys import WAL_FOLDER
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
            header = await archive.segment_header(item.name)
        except RepositoryCorrupt as error:
            log.warning("wal segment cannot be understood", wal_file=item.name, reason=error.one_line())
            continue
        if header is not None:
            return header.system_identifier
    return None
