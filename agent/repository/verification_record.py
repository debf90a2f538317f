"""What is known of reading a base backup back, noted beside it."""

from collections.abc import Sequence
from dataclasses import asdict

from agent.domain.verification_order import VerificationRecord
from agent.ports import ObjectStore
from agent.repository.backup_note import BackupNote
from agent.repository.documents import Document
from agent.tasks import by_name

VERIFIED = BackupNote("pitr_verified.json", "verification record", max_bytes=4 << 20)


def _parse(document: Document) -> VerificationRecord:
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


async def read_record(store: ObjectStore, backup: str) -> VerificationRecord:
    """Return what is known of verifying `backup`: nothing, if it never was, or if the record is damaged.

    Raises:
        RepositoryError: It could not be read.
    """
    return await VERIFIED.read(store, backup, _parse) or VerificationRecord()


async def read_records(store: ObjectStore, backups: Sequence[str]) -> dict[str, VerificationRecord]:
    """Return the record of each of `backups`, as `read_record`."""
    return await by_name(backups, lambda name: read_record(store, name))


async def write_record(store: ObjectStore, backup: str, record: VerificationRecord) -> None:
    """Keep `record`, unless the base backup is gone. Where nothing may be written, it is told and not kept."""
    await VERIFIED.write(store, backup, {**asdict(record), "tars": sorted(record.tars)})
