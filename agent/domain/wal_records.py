"""The WAL records that say where recovery can stop: what each of them says.

Sources: XLogRecord in PostgreSQL's src/include/access/xlogrecord.h; the structures of each kind as named below. All the
same in versions 13 to 18 where not said otherwise.
"""

import struct
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import google_crc32c

from agent.domain.transaction_lists import transaction_lists

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNIX_EPOCH = (datetime(1970, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND

RECORD_HEADER_BYTES = 24  # SizeOfXLogRecord
RECORD_HEADER = struct.Struct("<IIQBB2xI")  # length, xid, link to the record before, info, resource manager, CRC
INFO_OFFSET = 16  # in that header
MANAGER_OFFSET = 17
_TIME = struct.Struct("<q")
_LSN = struct.Struct("<Q")
_COUNT = struct.Struct("<I")

# Resource managers, rmgrlist.h.
_RM_XLOG = 0
RM_XACT = 1
RM_TABLESPACE = 5

# CheckPoint in pg_control.h: redo, nextXid, time (seconds since 1970, taken when it began), oldestActiveXid.
_CHECKPOINT = struct.Struct("<Q16xI36xq8xI")
_RESTORE_POINT_NAME_BYTES = 64  # MAXFNAMELEN
# xl_parameter_change in xlog_internal.h begins with them.
LIMITS = (
    "max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions",
    "max_locks_per_transaction",
)  # fmt: skip
_LIMITS = struct.Struct(f"<{len(LIMITS)}i")

_XACT_OPCODE_MASK = 0x70  # xact.h
_PREPARED = (0x30, 0x40)


class RecordKind(StrEnum):
    """What a record of interest says."""

    COMMIT = "commit"  # also of a prepared transaction
    ABORT = "abort"  # also of a prepared transaction or of a subtransaction
    RESTORE_POINT = "restore point"
    CHECKPOINT = "checkpoint"
    BACKUP_END = "backup end"
    SWITCH = "switch"
    END_OF_RECOVERY = "end of recovery"
    PARAMETER_CHANGE = "parameter change"
    TABLESPACE = "tablespace"  # made


_XLOG_KINDS = {
    0x00: RecordKind.CHECKPOINT,  # XLOG_CHECKPOINT_SHUTDOWN
    0x10: RecordKind.CHECKPOINT,  # XLOG_CHECKPOINT_ONLINE
    0x40: RecordKind.SWITCH,
    0x50: RecordKind.BACKUP_END,
    0x60: RecordKind.PARAMETER_CHANGE,
    0x70: RecordKind.RESTORE_POINT,
    0x90: RecordKind.END_OF_RECOVERY,
}
_XACT_KINDS = {
    0x00: RecordKind.COMMIT,
    0x20: RecordKind.ABORT,
    0x30: RecordKind.COMMIT,  # XLOG_XACT_COMMIT_PREPARED
    0x40: RecordKind.ABORT,  # XLOG_XACT_ABORT_PREPARED
}


def from_wal_time(wal_time: int) -> datetime:
    """Return a time as WAL holds it, microseconds since 2000-01-01 UTC (TimestampTz), as an aware time."""
    return _EPOCH + wal_time * _MICROSECOND


class WalRecord(NamedTuple):
    """One record of interest.

    lsn, end_lsn: where it begins, and where the next one may begin.
    xid: the transaction it ends (a prepared one's own), 0 where there is none. Recovery compares this very number with
        recovery_target_xid. Source: recoveryStopsBefore() in xlogrecovery.c.
    wal_time: microseconds since 2000-01-01 UTC, None where the record has no time. That of a checkpoint is the whole
        second in which it began, which may be minutes before the record was written.
    name: of a restore point; of TABLESPACE: its directory; else empty.
    start_lsn: of BACKUP_END: the start LSN of the base backup that ends here; of CHECKPOINT: its redo point; else 0.
    next_xid, oldest_active_xid: of CHECKPOINT: the next id to be given, as of the redo point, and the oldest
        transaction that was running or prepared (0: not told, as by a shutdown), modulo 2**32; else 0.
    limits: of PARAMETER_CHANGE: the server's `LIMITS` from then on, in their order; else empty.
    previous_lsn: where the record before it begins, of any kind.
    """

    kind: RecordKind
    lsn: int
    end_lsn: int
    xid: int
    wal_time: int | None
    name: str
    start_lsn: int
    next_xid: int = 0
    oldest_active_xid: int = 0
    limits: tuple[int, ...] = ()
    previous_lsn: int = 0

    @property
    def time(self) -> datetime | None:
        """The record's time, aware, UTC; None where it has none."""
        return None if self.wal_time is None else from_wal_time(self.wal_time)

    @property
    def ends_transaction(self) -> bool:
        """Whether this is a commit or abort: the records at which a time or a transaction can stop recovery."""
        return self.kind is RecordKind.COMMIT or self.kind is RecordKind.ABORT


def aligned(position: int) -> int:
    """Return where the next record may begin after `position`. Source: MAXALIGN() in PostgreSQL's c.h."""
    return (position + 7) & ~7


def kind_of(info: int, manager: int) -> RecordKind | None:
    """Return what a record with this xl_info and xl_rmid says, None if it is of no interest."""
    if manager == RM_XACT:
        return _XACT_KINDS.get(info & _XACT_OPCODE_MASK)
    if manager == RM_TABLESPACE and not info & 0xF0:  # XLOG_TBLSPC_CREATE
        return RecordKind.TABLESPACE
    return _XLOG_KINDS.get(info & 0xF0) if manager == _RM_XLOG else None


def parse_record(data: bytes, total: int, lsn: int, end_lsn: int, magic: int) -> WalRecord | None:
    """Read a record; None if it is of no interest. `data` may lack its end if it is very long; then no CRC is checked.

    Raises:
        ValueError: It is damaged.
    """
    if len(data) < RECORD_HEADER_BYTES:
        raise ValueError("no record is that short")
    _total, xid, previous, info, manager, crc = RECORD_HEADER.unpack_from(data)
    kind = kind_of(info, manager)
    if kind is None:
        return None
    if len(data) == total and google_crc32c.value(data[RECORD_HEADER_BYTES:] + data[:20]) != crc:
        raise ValueError("wrong CRC")
    try:
        record = _read_main_data(kind, info, xid, lsn, end_lsn, main_data(data), magic)
    except (struct.error, IndexError) as error:
        raise ValueError(f"too short for a record of kind {kind}") from error
    return record._replace(previous_lsn=previous)


def _read_main_data(
    kind: RecordKind, info: int, xid: int, lsn: int, end_lsn: int, main: bytes, magic: int
) -> WalRecord:
    wal_time: int | None = None
    name, start_lsn, next_xid, oldest_active_xid = "", 0, 0, 0
    limits: tuple[int, ...] = ()
    match kind:
        case RecordKind.COMMIT | RecordKind.ABORT:
            (wal_time,) = _TIME.unpack_from(main)
            if info & _XACT_OPCODE_MASK in _PREPARED:
                xid = transaction_lists(info, main, magic).prepared_xid
        case RecordKind.RESTORE_POINT:
            (wal_time,) = _TIME.unpack_from(main)
            raw = main[_TIME.size : _TIME.size + _RESTORE_POINT_NAME_BYTES]
            name = raw.partition(b"\0")[0].decode(errors="backslashreplace")
        case RecordKind.CHECKPOINT:
            start_lsn, next_xid, seconds, oldest_active_xid = _CHECKPOINT.unpack_from(main)
            wal_time = seconds * 1_000_000 + _UNIX_EPOCH
        case RecordKind.END_OF_RECOVERY:
            (wal_time,) = _TIME.unpack_from(main)
        case RecordKind.BACKUP_END:
            (start_lsn,) = _LSN.unpack_from(main)
        case RecordKind.PARAMETER_CHANGE:
            limits = _LIMITS.unpack_from(main)
        case RecordKind.TABLESPACE:  # xl_tblspc_create_rec: OID and path
            name = main[_COUNT.size :].partition(b"\0")[0].decode(errors="backslashreplace")
        case RecordKind.SWITCH:
            pass
    if wal_time is not None and not _EARLIEST <= wal_time <= _LATEST:
        raise ValueError(f"the time {wal_time} is out of range")
    return WalRecord(kind, lsn, end_lsn, xid, wal_time, name, start_lsn, next_xid, oldest_active_xid, limits)


def main_data(data: bytes) -> bytes:
    """Return a record's own data. Those of interest refer to no blocks.

    Raises:
        ValueError: It does refer to blocks.
        IndexError: It is cut short.
    """
    position = RECORD_HEADER_BYTES
    while position < len(data):
        match data[position]:
            case 253:  # XLR_BLOCK_ID_ORIGIN, u16
                position += 3
            case 252:  # XLR_BLOCK_ID_TOPLEVEL_XID, u32
                position += 5
            case 255:  # XLR_BLOCK_ID_DATA_SHORT, u8 length
                return data[position + 2 :][: data[position + 1]]
            case 254:  # XLR_BLOCK_ID_DATA_LONG, u32 length
                return data[position + 5 :][: _COUNT.unpack_from(data, position + 1)[0]]
            case block:
                raise ValueError(f"unexpected block reference {block}")
    return b""
