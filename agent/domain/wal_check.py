"""Whether bytes are the WAL that a segment must hold: the address of every page, length, link and CRC of every record.

PostgreSQL takes damaged WAL of the right size for the end of the WAL, and opens the server. So what no digest and no
codec's checksum proves is walked through before recovery gets it. WAL may end within an archived segment: then zeros or
an older use of the file follow. Damage shows by pages of this very segment that follow what is not valid.

A record that crosses into the next segment can only be checked when both are known: `continuation_problem`.

Sources: XLogReaderValidatePageHeader(), ValidXLogRecordHeader(), ValidXLogRecord() and XLogDecodeNextRecord() in
PostgreSQL's src/backend/access/transam/xlogreader.c.
"""

import struct
from dataclasses import dataclass

import google_crc32c

from agent.domain.lsn import format_lsn
from agent.domain.wal import (
    FIRST_IS_CONTINUATION,
    FIRST_IS_OVERWRITE,
    LONG_HEADER_BYTES,
    LONG_HEADER_FLAG,
    PAGE_HEADER,
    SHORT_HEADER_BYTES,
    WAL_PAGE_BYTES,
)
from agent.domain.wal_records import RECORD_HEADER, RECORD_HEADER_BYTES, RecordKind, aligned, kind_of

_PAGE = WAL_PAGE_BYTES
_CRC_OFFSET = 20  # the CRC covers what follows the header, then the header up to itself
_TOTAL = struct.Struct("<I")
_KEPT_HEAD_BYTES = 1 << 20  # of a record begun in the segment before; a longer one is not checked across segments


class _Invalid(Exception):
    """There is no valid record at `lsn`."""

    def __init__(self, lsn: int) -> None:
        super().__init__(lsn)
        self.lsn = lsn


@dataclass(slots=True)
class TornRecord:
    """A record of `total` bytes that begins at `lsn`, and what of it has been seen: its header, and its data's CRC."""

    lsn: int
    total: int
    header: bytes = b""
    data_crc: int = 0

    def with_more(self, data: bytes) -> "TornRecord":
        """Return the record with the bytes that follow."""
        lacking = RECORD_HEADER_BYTES - len(self.header)
        crc = google_crc32c.extend(self.data_crc, data[lacking:])
        return TornRecord(self.lsn, self.total, self.header + data[:lacking], crc)

    @property
    def is_valid(self) -> bool:
        """Whether the CRC of the record, seen to its end, is right."""
        crc = RECORD_HEADER.unpack(self.header)[-1]
        return bool(google_crc32c.extend(self.data_crc, self.header[:_CRC_OFFSET]) == crc)

    @property
    def is_switch(self) -> bool:
        """Whether nothing follows this record in the segment in which it ends."""
        return len(self.header) == RECORD_HEADER_BYTES and kind_of(*self.header[16:18]) is RecordKind.SWITCH


@dataclass(frozen=True, slots=True)
class CheckedSegment:
    """What was found in a segment whose pages and records are valid as far as they go.

    start_lsn, end_lsn: its bounds.
    ended_at: where the WAL ends in it; None if it goes on, or was switched.
    remaining: bytes of a record from the segment before, by the first page; 0: none. `head`: those that are here, None
        if they are too many to be kept. `gave_up`: the first page says that the record begun before has no end.
    torn: the record that goes on in the next segment; `torn_bytes`: how many bytes of it are to come. Without it, bytes
        to come are of a record that began before this segment and crosses it.
    """

    start_lsn: int
    end_lsn: int
    ended_at: int | None
    remaining: int
    head: bytes | None
    gave_up: bool
    torn: TornRecord | None
    torn_bytes: int


def continuation_problem(before: CheckedSegment, after: CheckedSegment) -> str | None:
    """Say why the segment `after` cannot follow `before` in one stream of WAL, or None if it can."""
    if after.gave_up or before.ended_at is not None:
        return None
    if before.torn_bytes != after.remaining:
        where = format_lsn(after.start_lsn)
        return f"the record before {where} lacks {before.torn_bytes} bytes, but {after.remaining} are said to follow"
    is_complete = after.head is not None and len(after.head) == after.remaining
    if before.torn is not None and after.head is not None and is_complete:
        whole = before.torn.with_more(after.head)
        if not whole.is_valid:
            return f"the record at {format_lsn(whole.lsn)} that continues into it has a wrong CRC"
    return None


def wal_ends_in(before: CheckedSegment | None, segment: CheckedSegment) -> bool:
    """Tell whether the WAL ends in `segment`, and is not just switched by a record that begins in the one before."""
    if segment.ended_at is None:
        return False
    torn = None if before is None else before.torn
    return torn is None or segment.head is None or not torn.with_more(segment.head).is_switch


class RecordCheck:
    """Checks one segment, taken piece by piece. Costs about 50 ms per 16 MiB."""

    def __init__(self) -> None:
        self._rest = b""
        self._magic = 0
        self._start: int | None = None
        self._address = 0
        self._ended_at: int | None = None
        self._switched = False
        self._goes_on_at: int | None = None
        self._link: int | None = None
        self._remaining = 0
        self._head: bytearray | None = bytearray()
        self._gave_up = False
        self._torn: TornRecord | None = None
        self._left = 0

    def take(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._rest:
            data = self._rest + data
        end = len(data) - len(data) % _PAGE
        for start in range(0, end, _PAGE):
            self._take_page(data[start : start + _PAGE])
        self._rest = data[end:]

    def finish(self) -> CheckedSegment:
        """Return what was found.

        Raises:
            ValueError: It is damaged.
        """
        if self._ended_at is not None and self._goes_on_at is not None:
            raise ValueError(
                f"its WAL is damaged at {format_lsn(self._ended_at)}: it goes on at {format_lsn(self._goes_on_at)}"
            )
        whole = self._ended_at is None and not self._switched
        return CheckedSegment(
            start_lsn=self._start or 0,
            end_lsn=self._address,
            ended_at=self._ended_at,
            remaining=self._remaining,
            head=None if self._head is None else bytes(self._head),
            gave_up=self._gave_up,
            torn=self._torn if whole else None,
            torn_bytes=self._left if whole else 0,
        )

    def _take_page(self, page: bytes) -> None:
        magic, info, _timeline, address, remaining = PAGE_HEADER.unpack_from(page)
        is_first = self._start is None
        if is_first:
            self._magic, self._start, self._address = magic, address, address
        expected, self._address = self._address, self._address + _PAGE
        is_ours = magic == self._magic and address == expected
        if self._switched or self._goes_on_at is not None:
            return
        if self._ended_at is not None:
            self._goes_on_at = expected if is_ours else None
            return
        if not is_ours:
            self._ended_at = expected
            return
        try:
            if is_first:
                self._begin(info, remaining)
            else:
                self._go_on(info, remaining, expected)
            self._take_records(page, LONG_HEADER_BYTES if info & LONG_HEADER_FLAG else SHORT_HEADER_BYTES, expected)
        except _Invalid as invalid:
            self._ended_at = invalid.lsn

    def _begin(self, info: int, remaining: int) -> None:
        self._gave_up = bool(info & FIRST_IS_OVERWRITE)
        if info & FIRST_IS_CONTINUATION:
            self._remaining = self._left = remaining

    def _go_on(self, info: int, remaining: int, address: int) -> None:
        """Check that a page which is not the first continues what the one before began, and nothing else."""
        if self._left and not info & FIRST_IS_CONTINUATION and info & FIRST_IS_OVERWRITE:
            self._left, self._torn, self._link = 0, None, None  # a crash left the record unfinished: it was given up
        said = remaining if info & FIRST_IS_CONTINUATION else 0
        if said != self._left:
            raise _Invalid(self._torn.lsn if self._torn is not None else address)

    def _take_records(self, page: bytes, position: int, address: int) -> None:
        if self._left:
            position = self._continue(page, position)
        while position < _PAGE and not self._switched:
            position = self._take_record(page, position, address + position)

    def _continue(self, page: bytes, position: int) -> int:
        """Take what this page has of a record begun before; return where the next one begins."""
        data = page[position : position + self._left]
        self._left -= len(data)
        if self._torn is not None:
            self._torn = self._torn.with_more(data)
            if not self._left:
                self._end_torn(self._torn)
        elif self._head is not None and len(self._head) + len(data) <= _KEPT_HEAD_BYTES:
            self._head += data
        else:
            self._head = None
        return aligned(position + len(data))

    def _end_torn(self, record: TornRecord) -> None:
        if not record.is_valid:
            raise _Invalid(record.lsn)
        self._check_link(RECORD_HEADER.unpack(record.header)[2], record.lsn)
        self._switched, self._torn = record.is_switch, None

    def _take_record(self, page: bytes, position: int, lsn: int) -> int:
        """Check the record that begins at `position`; return where the next one does."""
        (total,) = _TOTAL.unpack_from(page, position)
        end = position + total
        if total < RECORD_HEADER_BYTES:
            raise _Invalid(lsn)
        if end > _PAGE:
            self._torn = TornRecord(lsn, total).with_more(page[position:])
            self._left = end - _PAGE
            return _PAGE
        _total, _xid, previous, info, manager, crc = RECORD_HEADER.unpack_from(page, position)
        data_crc = google_crc32c.value(page[position + RECORD_HEADER_BYTES : end])
        if google_crc32c.extend(data_crc, page[position : position + _CRC_OFFSET]) != crc:
            raise _Invalid(lsn)
        self._check_link(previous, lsn)
        self._switched = not manager and kind_of(info, manager) is RecordKind.SWITCH
        return aligned(end)

    def _check_link(self, previous: int, lsn: int) -> None:
        """Check a record's link to the one before it: an older use of the file has valid records too."""
        if self._link is not None and previous != self._link:
            raise _Invalid(lsn)
        self._link = lsn
