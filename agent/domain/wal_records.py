"""The WAL records that say where recovery can stop: found by walking a segment record by record.

A segment is scanned on its own (`scan_segment`), in any order; a `RecordJoiner` puts neighbours together, so that a
record that begins in one segment and ends in the next is found too. As in PostgreSQL, WAL ends at the first record that
is not valid. Only records of interest have their CRC checked, the others their length and their link to the one before.

Sources: XLogRecord in PostgreSQL's src/include/access/xlogrecord.h; XLogPageHeaderData in xlog_internal.h;
XLogDecodeNextRecord() in src/backend/access/transam/xlogreader.c. All the same in versions 13 to 18 where not said
otherwise.
"""

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import google_crc32c

from agent.domain.transaction_lists import transaction_lists
from agent.domain.wal import (
    LONG_HEADER_BYTES,
    MAGIC_BY_MAJOR,
    SHORT_HEADER_BYTES,
    WAL_PAGE_BYTES,
    SegmentHeader,
    is_segment_size,
    parse_segment_header,
)

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNIX_EPOCH = (datetime(1970, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND

_PAGE = WAL_PAGE_BYTES
RECORD_HEADER_BYTES = 24  # SizeOfXLogRecord
_FIRST_PAGE_DATA = _PAGE - LONG_HEADER_BYTES
_PAGE_DATA = _PAGE - SHORT_HEADER_BYTES
FIRST_IS_CONTINUATION = 0x0001  # XLP_FIRST_IS_CONTRECORD
FIRST_IS_OVERWRITE = 0x0008  # XLP_FIRST_IS_OVERWRITE_CONTRECORD, 15 and minor releases of 13 and 14
_KEPT_HEAD_BYTES = 1 << 20  # of a record continued from the segment before; only a commit of very many is longer

PAGE_HEADER = struct.Struct("<HHIQI")  # magic, info, timeline, address, remaining
RECORD_HEADER = struct.Struct("<IIQBB2xI")  # length, xid, link to the record before, info, resource manager, CRC
_TIME = struct.Struct("<q")
_LSN = struct.Struct("<Q")
_COUNT = struct.Struct("<I")

# Resource managers, rmgrlist.h.
_RM_XLOG = 0
RM_XACT = 1
_RM_TABLESPACE = 5

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


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A record of `total` bytes that begins in one segment and ends in a later one; `present` bytes of it are known.

    `data` is what is known of it, or no more than its first bytes if it is of no interest.
    """

    lsn: int
    total: int
    present: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SegmentScan:
    """What one segment holds.

    start_lsn, end_lsn: the segment's bounds.
    records: the records of interest that begin and end in it.
    last_lsn: start of the last record, of any kind, that begins and ends in it; None if none does.
    is_whole: False if zeros or damage follow a valid record: the WAL ends in it. True after a SWITCH.
    remaining: bytes that the segment's first page says are left of a record from the segment before; 0: none.
    head: those of them that are here, cut after 1 MiB.
    head_end_lsn: where that record ends; None if there is none, or it goes on in the next segment.
    tail: the record that goes on in the next segment, or None.
    """

    magic: int
    start_lsn: int
    end_lsn: int
    records: tuple[WalRecord, ...]
    last_lsn: int | None
    is_whole: bool
    remaining: int
    head: bytes
    head_end_lsn: int | None
    tail: Unfinished | None


def scan_segment(content: bytes) -> SegmentScan:
    """Find the records of interest in the bytes of one WAL segment.

    Raises:
        ValueError: It does not begin with the header of a segment of this size.
    """
    return _Scanner(content, scannable_header(content[:LONG_HEADER_BYTES], len(content))).scan()


def scannable_header(head: bytes, size: int) -> SegmentHeader:
    """Return the header of one whole WAL segment of `size` bytes that begins with `head`, whose records can be read.

    Raises:
        ValueError: It is not one, or of a version or page size that is not known.
    """
    header = parse_segment_header(head)
    if not is_segment_size(header.segment_bytes) or header.segment_bytes != size:
        raise ValueError(f"it has {size} bytes, but its header says {header.segment_bytes}")
    if header.magic not in MAGIC_BY_MAJOR.values() or header.page_bytes != _PAGE:
        raise ValueError(f"its magic {header.magic:04X} or its page size {header.page_bytes} is unknown")
    return header


class RecordJoiner:
    """Takes the scans of consecutive segments in order; finds the records of interest, across boundaries too.

    last_lsn: start of the last record, of any kind, that is complete in what was taken; None if there is none yet.
    ended: whether the WAL has ended: zeros, damage, or a segment that does not continue the one before.
    """

    def __init__(self) -> None:
        self.last_lsn: int | None = None
        self.ended = False
        self._pending: Unfinished | None = None
        self._expected: int | None = None

    def take(self, scan: SegmentScan) -> list[WalRecord]:
        """Return the records of interest that end in the next segment, in order; none once the WAL has ended."""
        if self.ended or (self._expected is not None and scan.start_lsn != self._expected):
            self.ended = True
            return []
        self._expected = scan.end_lsn
        try:
            first = self._take_head(scan)
        except ValueError:
            self.ended = True
            return []
        if scan.last_lsn is not None:
            self.last_lsn = scan.last_lsn
        if first is not None and first.kind is RecordKind.SWITCH:  # the rest of this segment is zeros
            return [first._replace(end_lsn=scan.end_lsn)]
        self.ended = not scan.is_whole
        return [*scan.records] if first is None else [first, *scan.records]

    def _take_head(self, scan: SegmentScan) -> WalRecord | None:
        """Return the record that ends here if it is of interest; raise ValueError if it is not continued as it must."""
        pending, self._pending = self._pending, scan.tail
        if pending is None or not scan.remaining:
            return None
        if scan.remaining != pending.total - pending.present:
            raise ValueError("the segment continues another record")
        whole = pending.data + scan.head if _may_interest(pending.data) else pending.data
        if scan.head_end_lsn is None:
            present = pending.present + _data_bytes(scan.end_lsn - scan.start_lsn)
            self._pending = Unfinished(pending.lsn, pending.total, present, whole)
            return None
        record = parse_record(whole, pending.total, pending.lsn, scan.head_end_lsn, scan.magic)
        self.last_lsn = pending.lsn
        return record


class _Scanner:
    """Walks one segment. Positions count the bytes of the segment without its page headers.

    Without them every record is in one piece. Source: XLogBytePosToRecPtr() in xlog.c counts likewise.
    """

    def __init__(self, content: bytes, header: SegmentHeader) -> None:
        self._magic = header.magic
        self._base = header.page_address
        self._end_lsn = header.page_address + len(content)
        self._flags: list[int] = []
        self._remaining: list[int] = []
        view, pieces = memoryview(content), []
        for offset in range(0, len(content), _PAGE):
            magic, info, _timeline, address, remaining = PAGE_HEADER.unpack_from(content, offset)
            if magic != header.magic or address != header.page_address + offset:
                break
            self._flags.append(info)
            self._remaining.append(remaining)
            pieces.append(view[offset + (SHORT_HEADER_BYTES if offset else LONG_HEADER_BYTES) : offset + _PAGE])
        self._stream = b"".join((*pieces, bytes(RECORD_HEADER_BYTES)))  # so that a header can always be unpacked
        self._limit = len(self._stream) - RECORD_HEADER_BYTES
        self._pages_are_whole = len(pieces) * _PAGE == len(content)
        self._switched = False
        self._records: list[WalRecord] = []
        self._last: int | None = None
        self._tail: Unfinished | None = None

    def scan(self) -> SegmentScan:
        remaining = self._remaining[0] if self._flags[0] & FIRST_IS_CONTINUATION else 0
        ends_here = remaining <= self._limit
        went_on = not ends_here or self._walk(aligned(remaining))
        return SegmentScan(
            magic=self._magic,
            start_lsn=self._base,
            end_lsn=self._end_lsn,
            records=tuple(self._records),
            last_lsn=None if self._last is None else self._lsn(self._last),
            is_whole=self._switched or (went_on and self._pages_are_whole),
            remaining=remaining,
            head=self._stream[: min(remaining, self._limit, _KEPT_HEAD_BYTES)],
            head_end_lsn=self._lsn_of_end(remaining) if remaining and ends_here else None,
            tail=self._tail,
        )

    def _walk(self, position: int) -> bool:
        """Collect the records from `position` on; return whether they go on to the end of the pages."""
        stream, limit = self._stream, self._limit
        page, page_end, lsn_shift = 0, _FIRST_PAGE_DATA, self._base + LONG_HEADER_BYTES
        link: int | None = None
        while position < limit:
            while position >= page_end:
                page, page_end, lsn_shift = page + 1, page_end + _PAGE_DATA, lsn_shift + SHORT_HEADER_BYTES
            if position + _PAGE_DATA == page_end and self._flags[page] & FIRST_IS_CONTINUATION:
                return False
            total, _xid, previous, info, manager, _crc = RECORD_HEADER.unpack_from(stream, position)
            if total < RECORD_HEADER_BYTES:
                return False
            end = position + total
            if end > page_end:
                go_on = self._crossed(position, total, page + 1, page_end)
                if go_on != position:
                    if go_on is None:
                        return False
                    position = go_on
                    continue
                if end > limit:
                    return self._leave_unfinished(position, total)
            if previous != link and link is not None:
                return False
            link = lsn_shift + position
            if manager <= _RM_TABLESPACE and kind_of(info, manager) and not self._found(position, end, link):
                return False
            self._last = position
            if self._switched:
                return True
            position = (end + 7) & ~7
        return True

    def _crossed(self, position: int, total: int, page: int, page_start: int) -> int | None:
        """Check a record's way over the pages from `page` on; return where to go on.

        That is `position` if all is well, the start of a page if a crash left the record unfinished and it was given up
        there, None if the WAL ends here. Source: XLogDecodeNextRecord() in xlogreader.c.
        """
        while page_start < position + total and page < len(self._flags):
            if not self._flags[page] & FIRST_IS_CONTINUATION:
                return page_start if self._flags[page] & FIRST_IS_OVERWRITE else None
            if self._remaining[page] != position + total - page_start:
                return None
            page, page_start = page + 1, page_start + _PAGE_DATA
        return position

    def _found(self, position: int, end: int, lsn: int) -> bool:
        """Keep the record of interest at `position`; return whether it is valid."""
        try:
            record = parse_record(self._stream[position:end], end - position, lsn, self._lsn_of_end(end), self._magic)
        except ValueError:
            return False
        if record is not None and record.kind is RecordKind.SWITCH:  # the rest of the segment is zeros
            record = record._replace(end_lsn=self._end_lsn)
            self._switched = True
        if record is not None:
            self._records.append(record)
        return True

    def _leave_unfinished(self, position: int, total: int) -> bool:
        if not self._pages_are_whole:
            return False
        data = self._stream[position : self._limit]
        kept = data if _may_interest(data) else data[:RECORD_HEADER_BYTES]
        self._tail = Unfinished(self._lsn(position), total, len(data), kept)
        return True

    def _lsn(self, position: int) -> int:
        pages_before = (position + _PAGE_DATA - _FIRST_PAGE_DATA) // _PAGE_DATA
        return self._base + LONG_HEADER_BYTES + pages_before * SHORT_HEADER_BYTES + position

    def _lsn_of_end(self, end: int) -> int:
        """LSN after a record that ends at `end`; on a page's boundary the page header is not counted."""
        return self._lsn(aligned(end) - 1) + 1


def aligned(position: int) -> int:
    """Return where the next record may begin after `position`. Source: MAXALIGN() in PostgreSQL's c.h."""
    return (position + 7) & ~7


def _data_bytes(segment_bytes: int) -> int:
    """Bytes of a segment that are not page headers."""
    return segment_bytes // _PAGE * _PAGE_DATA + _FIRST_PAGE_DATA - _PAGE_DATA


def kind_of(info: int, manager: int) -> RecordKind | None:
    """Return what a record with this xl_info and xl_rmid says, None if it is of no interest."""
    if manager == RM_XACT:
        return _XACT_KINDS.get(info & _XACT_OPCODE_MASK)
    if manager == _RM_TABLESPACE and not info & 0xF0:  # XLOG_TBLSPC_CREATE
        return RecordKind.TABLESPACE
    return _XLOG_KINDS.get(info & 0xF0) if manager == _RM_XLOG else None


def _may_interest(data: bytes) -> bool:
    return len(data) < RECORD_HEADER_BYTES or kind_of(data[16], data[17]) is not None


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
