"""Every record of archived WAL, whole, in order: for whoever wants more than where recovery can stop.

`scan_segment` in `wal_scan` is faster, for it looks at few records, and can begin anywhere; this reads on.

Source: XLogReadRecord() in PostgreSQL's src/backend/access/transam/xlogreader.c.
"""

from collections.abc import Iterator

from agent.domain.wal import FIRST_IS_CONTINUATION, LONG_HEADER_BYTES, PAGE_HEADER, SHORT_HEADER_BYTES, WAL_PAGE_BYTES
from agent.domain.wal_records import INFO_OFFSET, MANAGER_OFFSET, RECORD_HEADER_BYTES, RecordKind, aligned, kind_of
from agent.domain.wal_scan import scannable_header


class WalWalk:
    """Takes the contents of consecutive segments; yields the records that end in each: where one begins, and its bytes.

    The segments have been checked by whoever fetched them; WAL that ends early just yields no more.

    magic: of the segment that was taken last.
    """

    def __init__(self) -> None:
        self.magic = 0
        self._carried: bytearray | None = None  # what is known of a record that goes on on the next page
        self._carried_lsn = 0
        self._expected: int | None = None

    def take(self, content: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the records that end in the segment `content`, but one that began in a segment not taken.

        Raises:
            ValueError: It is not a WAL segment.
        """
        header = scannable_header(content[:LONG_HEADER_BYTES], len(content))
        self.magic, base = header.magic, header.page_address
        if base != self._expected:
            self._carried = None
        self._expected = base + len(content)
        for offset in range(0, len(content), WAL_PAGE_BYTES):
            magic, flags, _timeline, address, remaining = PAGE_HEADER.unpack_from(content, offset)
            if magic != header.magic or address != base + offset:
                return
            begin = offset + (SHORT_HEADER_BYTES if offset else LONG_HEADER_BYTES)
            stop = offset + WAL_PAGE_BYTES
            if flags & FIRST_IS_CONTINUATION:
                yield from self._continued(content[begin : min(begin + remaining, stop)], remaining)
                begin += aligned(remaining)
            else:
                self._carried = None  # a crash cut it short, and it was given up
            for position, data in self._on_page(content, begin, stop, base):
                yield base + position, data
                if kind_of(data[INFO_OFFSET], data[MANAGER_OFFSET]) is RecordKind.SWITCH:
                    return

    def _continued(self, part: bytes, remaining: int) -> Iterator[tuple[int, bytes]]:
        if self._carried is None:
            return
        self._carried += part
        if len(part) == remaining:
            yield self._carried_lsn, bytes(self._carried)
            self._carried = None

    def _on_page(self, content: bytes, position: int, stop: int, base: int) -> Iterator[tuple[int, bytes]]:
        """Yield the records that begin and end on a page, and keep what is there of the last one."""
        while position < stop:
            total = int.from_bytes(content[position : position + 4], "little")
            if total < RECORD_HEADER_BYTES:
                return
            if position + total > stop:
                self._carried, self._carried_lsn = bytearray(content[position:stop]), base + position
                return
            yield position, content[position : position + total]
            position = aligned(position + total)
