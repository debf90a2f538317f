"""How drills of a base backup ended, noted beside it.

A drill is a Job, gone when somebody asks: the agent beside the server learns of it here. Why one failed is told by its
log alone, for that may say what is in the data, and these objects are not encrypted.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from agent.domain.drill import DrillRecord
from agent.errors import RepositoryError
from agent.ports import ObjectStore
from agent.repository.backup_note import BackupNote
from agent.repository.documents import Document
from agent.tasks import by_name

DRILLED = BackupNote("pitr_drilled.json", "drill record")


def _parse(document: Document) -> DrillRecord:
    return DrillRecord(
        succeeded_at=document.moment("succeeded_at"),
        moment=document.moment("moment"),
        milliseconds=document.whole("milliseconds"),
        failed_at=document.moment("failed_at"),
        exit_code=document.whole("exit_code"),
    )


async def read_drill(store: ObjectStore, backup: str) -> DrillRecord:
    """Return how drills of `backup` ended: nothing, if there was none, or if the record is damaged.

    Raises:
        RepositoryError: It could not be read.
    """
    return await DRILLED.read(store, backup, _parse) or DrillRecord()


async def read_drills(store: ObjectStore, backups: Sequence[str]) -> dict[str, DrillRecord]:
    """Return how drills of each of `backups` ended, as `read_drill`."""
    return await by_name(backups, lambda name: read_drill(store, name))


async def write_drill(store: ObjectStore, backup: str, record: DrillRecord) -> None:
    """Keep what `record` tells, and what was known besides, unless the base backup is gone.

    Where nothing may be read or written, that is told, and nothing is kept.
    """
    try:
        known = await read_drill(store, backup)
    except RepositoryError as error:
        DRILLED.was_not_stored(backup, error)
        return
    await DRILLED.write(store, backup, _told(known) | _told(record))


def _told(record: DrillRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}
