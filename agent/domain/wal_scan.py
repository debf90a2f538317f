"""Finds the WAL records that say where recovery can stop, by walking a segment record by record.

A segment is scanned on its own (`scan_segment`), in any order; a `RecordJoiner` puts neighbours together, so that a
record that begins in one segment and ends in the next is found too. As in PostgreSQL, WAL ends at the first record that
is not valid. Only records of interest have their CRC checked, the others their length and their link to the one before.

Sources: XLogPageHeaderData in PostgreSQL's src/include/access/xlog_internal.h; XLogDecodeNextRecord() in
src/backend/access/transam/xlogreader.c. All the same in versions 13 to 18.
"""

from dataclasses import dataclass

from agent.domain.wal import (
    FIRST_IS_CONTINUATION,
    FIRST_IS_OVERWRITE,
    LONG_HEADER_BYTES,
    MAGIC_BY_MAJOR,
    PAGE_HEADER,
    SHORT_HEADER_BYTES,
    WAL_PAGE_BYTES,
    SegmentHeader,
    is_segment_size,
    parse_segment_header,
)
from agent.domain.wal_records import (
    INFO_OFFSET,
    MANAGER_OFFSET,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    RM_TABLESPACE,
    RecordKind,
    WalRecord,
    aligned,
    kind_of,
    parse_record,
)

_PAGE = WAL_PAGE_BYTES
_FIRST_PAGE_DATA = _PAGE - LONG_HEADER_BYTES
_PAGE_DATA = _PAGE - SHORT_HEADER_BYTES
_KEPT_HEAD_BYTES = 1 << 20  # of a record continued from the segment before; only a commit of very many is longer


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
            if manager <= RM_TABLESPACE and kind_of(info, manager) and not self._found(position, end, link):
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


def _data_bytes(segment_bytes: int) -> int:
    """Bytes of a segment that are not page headers."""
    return segment_bytes // _PAGE * _PAGE_DATA + _FIRST_PAGE_DATA - _PAGE_DATA


def _may_interest(data: bytes) -> bool:
    return len(data) < RECORD_HEADER_BYTES or kind_of(data[INFO_OFFSET], data[MANAGER_OFFSET]) is not None
