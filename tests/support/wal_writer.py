"""Writes WAL as PostgreSQL lays it out, for tests that need records nobody's server wrote."""

import struct
from datetime import UTC, datetime, timedelta

import google_crc32c

from agent.domain.wal import LONG_HEADER_BYTES, MAGIC_BY_MAJOR, SHORT_HEADER_BYTES, WAL_PAGE_BYTES

SEGMENT_BYTES = 1 << 20
SYSTEM_IDENTIFIER = 7_300_000_000_000_000_001
RM_XLOG, RM_XACT, RM_HEAP = 0, 1, 10
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def to_wal_time(moment: datetime) -> int:
    """Return an aware time as WAL holds it: microseconds since 2000-01-01 UTC (TimestampTz)."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


class WalWriter:
    """Appends records to a stream of WAL that begins with the segment at `start_lsn`."""

    def __init__(
        self, start_lsn: int = SEGMENT_BYTES, *, segment_bytes: int = SEGMENT_BYTES, major: int = 15, timeline: int = 1
    ) -> None:
        self._start_lsn = start_lsn
        self._segment_bytes = segment_bytes
        self._magic = MAGIC_BY_MAJOR[major]
        self._timeline = timeline
        self._wal = bytearray()
        self._link = 0
        self._records: list[tuple[int, int]] = []

    @property
    def lsn(self) -> int:
        """Where the next record is inserted, page header not counted."""
        return self._start_lsn + len(self._wal)

    def fork(self, lsn: int, timeline: int) -> "WalWriter":
        """Return a writer of a new timeline that leaves this one at `lsn`, the end of a record."""
        other = WalWriter(self._start_lsn, segment_bytes=self._segment_bytes, timeline=timeline)
        other._magic = self._magic
        other._wal = self._wal[: lsn - self._start_lsn]
        other._link = max((start for start, end in self._records if end <= lsn), default=0)
        other._records = [record for record in self._records if record[1] <= lsn]
        return other

    def segments(self) -> list[bytes]:
        """Return the segments so far; the last one ends with zeros."""
        padding = -len(self._wal) % self._segment_bytes
        whole = bytes(self._wal) + bytes(padding)
        return [whole[i : i + self._segment_bytes] for i in range(0, len(whole), self._segment_bytes)]

    def record(
        self, manager: int, info: int, main: bytes, *, xid: int = 0, before_main: bytes = b""
    ) -> tuple[int, int]:
        """Append a record; return where it begins and where it ends, as PostgreSQL counts them."""
        length = bytes([255, len(main)]) if len(main) < 256 else b"\xfe" + struct.pack("<I", len(main))
        body = before_main + (length + main if main else b"")
        head = struct.pack("<IIQBB2x", 24 + len(body), xid, self._link, info, manager)
        whole = head + struct.pack("<I", google_crc32c.value(body + head)) + body
        if len(self._wal) % WAL_PAGE_BYTES == 0:
            self._page_header(0)
        start = self.lsn
        while whole:
            if len(self._wal) % WAL_PAGE_BYTES == 0:
                self._page_header(len(whole))
            room = WAL_PAGE_BYTES - len(self._wal) % WAL_PAGE_BYTES
            self._wal += whole[:room]
            whole = whole[room:]
        self._wal += bytes(-len(self._wal) % 8)
        self._link = start
        self._records.append((start, self.lsn))
        return start, self.lsn

    def transaction(self, opcode: int, xid: int, wal_time: int, *, rest: bytes = b"") -> tuple[int, int]:
        """Append a commit (0x00), an abort (0x20) or one of a prepared transaction (0x30, 0x40)."""
        return self.record(RM_XACT, opcode | (0x80 if rest else 0), struct.pack("<q", wal_time) + rest, xid=xid)

    def restore_point(self, name: str, wal_time: int) -> tuple[int, int]:
        """Append what pg_create_restore_point() writes."""
        return self.record(RM_XLOG, 0x70, struct.pack("<q64s", wal_time, name.encode()))

    def checkpoint(self, unix_seconds: int, *, next_xid: int = 0, oldest_active_xid: int = 0) -> tuple[int, int]:
        """Append an online checkpoint whose redo point is the record itself."""
        redo = self.lsn if next_xid else 0
        main = struct.pack("<Q16xI36xq8xII", redo, next_xid, unix_seconds, oldest_active_xid, 0)
        return self.record(RM_XLOG, 0x10, main)

    def backup_end(self, start_lsn: int) -> tuple[int, int]:
        """Append the end of the base backup that began at `start_lsn`."""
        return self.record(RM_XLOG, 0x50, struct.pack("<Q", start_lsn))

    def end_of_recovery(self, wal_time: int) -> tuple[int, int]:
        """Append what a promoted server writes first."""
        return self.record(RM_XLOG, 0x90, struct.pack("<qII", wal_time, self._timeline, self._timeline - 1))

    def filler(self, size: int) -> tuple[int, int]:
        """Append a record of no interest with `size` bytes of data."""
        return self.record(RM_HEAP, 0x00, bytes(size))

    def switch(self) -> tuple[int, int]:
        """Append a switch and the zeros after it; return where the record begins and the segment ends."""
        start, _ = self.record(RM_XLOG, 0x40, b"")
        self._wal += bytes(-len(self._wal) % self._segment_bytes)
        return start, self.lsn

    def give_up_record(self, size: int) -> None:
        """Append the beginning of a record of `size` bytes that a crash cut short, and the page that overwrites it."""
        if len(self._wal) % WAL_PAGE_BYTES == 0:
            self._page_header(0)
        room = WAL_PAGE_BYTES - len(self._wal) % WAL_PAGE_BYTES
        assert 24 + size > room
        self._wal += struct.pack("<IIQBB2xI", 24 + size, 0, self._link, 0, RM_HEAP, 0)[:room]
        self._wal += bytes(-len(self._wal) % WAL_PAGE_BYTES)
        self._page_header(0, flags=0x0008)

    def _page_header(self, remaining: int, *, flags: int = 0) -> None:
        address = self.lsn
        is_first = address % self._segment_bytes == 0
        flags |= (0x0001 if remaining else 0) | (0x0002 if is_first else 0)
        self._wal += struct.pack("<HHIQI4x", self._magic, flags, self._timeline, address, remaining)
        if is_first:
            self._wal += struct.pack("<QII", SYSTEM_IDENTIFIER, self._segment_bytes, WAL_PAGE_BYTES)
        assert len(self._wal) % WAL_PAGE_BYTES == (LONG_HEADER_BYTES if is_first else SHORT_HEADER_BYTES)
