"""What is known of reading a base backup back, kept in its folder, which WAL-G ignores and removes with the backup."""

import json
from collections.abc import Sequence

import structlog

from agent.domain.restore_target import format_time
from agent.domain.verification_order import VerificationRecord
from agent.errors import RepositoryCorrupt, RepositoryError
from agent.ports import ObjectStore
from agent.repository.documents import read_document
from agent.repository.keys import backup_folder, sentinel_key
from agent.tasks import by_name

_MAX_BYTES = 4 << 20

log = structlog.get_logger()


def record_key(backup: str) -> str:
    """Key of the record of the base backup `backup`."""
    return f"{backup_folder(backup)}pitr_verified.json"


async def read_record(store: ObjectStore, backup: str) -> VerificationRecord:
    """Return what is known of verifying `backup`: nothing, if it never was, or if the record is damaged.

    Raises:
        RepositoryError: It could not be read.
    """
    try:
        document = await read_document(store, record_key(backup), _MAX_BYTES)
        if document is None:
            return VerificationRecord()
        return VerificationRecord(
            verified_at=document.moment("verified_at"),
            problems=tuple(document.texts("problems")),
            is_complete=document.flag("is_complete"),
            tars=frozenset(document.texts("tars")),
            files=document.whole("files") or 0,
            wal_through=document.text("wal_through") or "",
            found=tuple(document.texts("found")),
            read_at=document.moment("read_at"),
            read_bytes=document.whole("read_bytes") or 0,
        )
    except RepositoryCorrupt as error:
        log.warning("verification record cannot be understood", backup_id=backup, reason=error.one_line())
        return VerificationRecord()


async def read_records(store: ObjectStore, backups: Sequence[str]) -> dict[str, VerificationRecord]:
    """Return the record of each of `backups`, as `read_record`."""
    return await by_name(backups, lambda name: read_record(store, name))


async def write_record(store: ObjectStore, backup: str, record: VerificationRecord) -> None:
    """Keep `record`, unless the base backup is gone. Where nothing may be written, it is told and not kept."""
    values = {
        "verified_at": None if record.verified_at is None else format_time(record.verified_at),
        "problems": record.problems,
        "is_complete": record.is_complete,
        "tars": sorted(record.tars),
        "files": record.files,
        "wal_through": record.wal_through,
        "found": record.found,
        "read_at": None if record.read_at is None else format_time(record.read_at),
        "read_bytes": record.read_bytes,
    }
    try:
        if await store.head(sentinel_key(backup)) is not None:
            await store.put(record_key(backup), json.dumps(values, separators=(",", ":")).encode())
    except RepositoryError as error:
        log.warning("verification record was not stored", backup_id=backup, reason=error.one_line())
