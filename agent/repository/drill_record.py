"""How drills of a base backup ended, kept in its folder, which WAL-G ignores and removes with the backup.

A drill is a Job, gone when somebody asks: the agent beside the server learns of it here. Why one failed is told by its
log alone, for that may say what is in the data, and these objects are not encrypted.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import structlog

from agent.domain.drill import DrillRecord
from agent.domain.restore_target import format_time
from agent.errors import RepositoryCorrupt, RepositoryError
from agent.ports import ObjectStore
from agent.repository.documents import read_document
from agent.repository.keys import backup_folder, sentinel_key
from agent.tasks import by_name

_MAX_BYTES = 64 << 10

log = structlog.get_logger()


def drill_key(backup: str) -> str:
    """Key of the record of the base backup `backup`."""
    return f"{backup_folder(backup)}pitr_drilled.json"


async def read_drill(store: ObjectStore, backup: str) -> DrillRecord:
    """Return how drills of `backup` ended: nothing, if there was none, or if the record is damaged.

    Raises:
        RepositoryError: It could not be read.
    """
    try:
        document = await read_document(store, drill_key(backup), _MAX_BYTES)
        if document is None:
            return DrillRecord()
        return DrillRecord(
            succeeded_at=document.moment("succeeded_at"),
            moment=document.moment("moment"),
            milliseconds=document.whole("milliseconds"),
            failed_at=document.moment("failed_at"),
            exit_code=document.whole("exit_code"),
        )
    except RepositoryCorrupt as error:
        log.warning("drill record cannot be understood", backup_id=backup, reason=error.one_line())
        return DrillRecord()


async def read_drills(store: ObjectStore, backups: Sequence[str]) -> dict[str, DrillRecord]:
    """Return how drills of each of `backups` ended, as `read_drill`."""
    return await by_name(backups, lambda name: read_drill(store, name))


async def write_drill(store: ObjectStore, backup: str, record: DrillRecord) -> None:
    """Keep what `record` tells, and what was known besides, unless the base backup is gone.

    Where nothing may be read or written, that is told, and nothing is kept.
    """
    try:
        known = _values(await read_drill(store, backup)) | _values(record)
        if await store.head(sentinel_key(backup)) is not None:
            await store.put(drill_key(backup), json.dumps(known, separators=(",", ":")).encode())
    except RepositoryError as error:
        log.warning("drill record was not stored", backup_id=backup, reason=error.one_line())


def _values(record: DrillRecord) -> dict[str, Any]:
    told = {name: value for name, value in asdict(record).items() if value is not None}
    return {name: format_time(value) if isinstance(value, datetime) else value for name, value in told.items()}
