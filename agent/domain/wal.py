"""WAL files: their names, their order, and the header a segment must begin with."""

import re
import struct
from dataclasses import dataclass
from enum import StrEnum

from agent.domain.lsn import format_lsn

LOG_BYTES = 1 << 32  # WAL bytes per "log" field of a name. Source: XLogSegmentsPerXLogId(), xlog_internal.h
SEGMENT_SIZES = tuple(1 << exponent for exponent in range(20, 31))
"""Every legal wal_segment_size. Source: WalSegMinSize and WalSegMaxSize, xlog_internal.h."""
MAX_SEGMENT_BYTES = SEGMENT_SIZES[-1]
WAL_PAGE_BYTES = 8192  # XLOG_BLCKSZ of every official build
SHORT_HEADER_BYTES = 24  # SizeOfXLogShortPHD after MAXALIGN
LONG_HEADER_BYTES = 40  # SizeOfXLogLongPHD after MAXALIGN
FIRST_IS_CONTINUATION = 0x0001  # XLP_FIRST_IS_CONTRECORD, xlog_internal.h
LONG_HEADER_FLAG = 0x0002  # XLP_LONG_HEADER, xlog_internal.h
FIRST_IS_OVERWRITE = 0x0008  # XLP_FIRST_IS_OVERWRITE_CONTRECORD, 15 and minor releases of 13 and 14
PAGE_HEADER = struct.Struct("<HHIQI")  # magic, info, timeline, address, remaining

# XLOG_PAGE_MAGIC of each major version, xlog_internal.h of its stable branch.
MAGIC_BY_MAJOR = {13: 0xD106, 14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_PARTIAL = re.compile(r"[0-9A-F]{24}\.partial")
_HISTORY = re.compile(r"[0-9A-F]{8}\.history")
_BACKUP_HISTORY = re.compile(r"[0-9A-F]{24}\.[0-9A-F]{8}\.backup")
_LONG_HEADER = struct.Struct("<HHIQI4xQII")


class WalFileKind(StrEnum):
    """What archive_command may be handed."""

    SEGMENT = "segment"
    PARTIAL = "partial"
    HISTORY = "history"
    BACKUP_HISTORY = "backup history"


def wal_file_kind(name: str) -> WalFileKind | None:
    """Return which WAL file `name` can be, or None if PostgreSQL never gives a file that name.

    Source: IsXLogFileName() and its siblings in xlog_internal.h.
    """
    if _SEGMENT.fullmatch(name):
        return WalFileKind.SEGMENT
    if _HISTORY.fullmatch(name):
        return WalFileKind.HISTORY
    if _PARTIAL.fullmatch(name):
        return WalFileKind.PARTIAL
    if _BACKUP_HISTORY.fullmatch(name):
        return WalFileKind.BACKUP_HISTORY
    return None


def is_segment_size(segment_bytes: int) -> bool:
    """Tell whether `segment_bytes` is a legal wal_segment_size: a power of two, 1 MiB to 1 GiB."""
    return segment_bytes in SEGMENT_SIZES


def segment_name(timeline: int, lsn: int, segment_bytes: int) -> str:
    """Name the WAL segment that holds the byte at `lsn`.

    Args:
        timeline: Timeline ID, 1 to 2**32 - 1.
        lsn: Byte position in the WAL stream, 0 to 2**64 - 1.
        segment_bytes: `wal_segment_size`: a power of two, 1 MiB to 1 GiB.

    Returns:
        24 upper-case hex digits: timeline, log and segment, 8 each.

    Source: XLogFileName() in PostgreSQL's src/include/access/xlog_internal.h.
    """
    log, offset = divmod(lsn, LOG_BYTES)
    return f"{timeline:08X}{log:08X}{offset // segment_bytes:08X}"


def parse_segment_name(name: str, segment_bytes: int) -> tuple[int, int]:
    """Return the timeline and the start LSN of the segment called `name`.

    Raises:
        ValueError: `name` is not 24 upper-case hex digits, or its last 8 exceed what `segment_bytes` allows.
    """
    if not _SEGMENT.fullmatch(name):
        raise ValueError(f'"{name}" is not the name of a WAL segment')
    timeline, log, segment = (int(name[i : i + 8], 16) for i in (0, 8, 16))
    if segment >= LOG_BYTES // segment_bytes:
        raise ValueError(f'"{name}" cannot exist with WAL segments of {segment_bytes} bytes')
    return timeline, log * LOG_BYTES + segment * segment_bytes


def segment_position(name: str, segment_bytes: int) -> tuple[int, int] | None:
    """Return timeline and number (start LSN by segment size) of the segment `name`, None if it is no segment."""
    try:
        timeline, start_lsn = parse_segment_name(name, segment_bytes)
    except ValueError:
        return None
    return timeline, start_lsn // segment_bytes


def segments_between(timeline: int, start_lsn: int, stop_lsn: int, segment_bytes: int) -> list[str]:
    """Name the segments that hold the bytes from `start_lsn` up to, not including, `stop_lsn`.

    A stop LSN on a segment boundary does not need the segment that begins there.
    """
    first = start_lsn - start_lsn % segment_bytes
    last = max(stop_lsn - 1, start_lsn)
    return [segment_name(timeline, lsn, segment_bytes) for lsn in range(first, last + 1, segment_bytes)]


def archive_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which PostgreSQL archives: history files first, then by name.

    Source: ready_file_comparator() in PostgreSQL's src/backend/postmaster/pgarch.c.
    """
    return (0 if name.endswith(".history") else 1, name)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The long page header at the start of a WAL segment."""

    magic: int
    timeline: int
    page_address: int
    system_identifier: int
    segment_bytes: int
    page_bytes: int

    @property
    def major_version(self) -> int | None:
        """PostgreSQL major version that writes this magic, or None if it is unknown."""
        return next((major for major, magic in MAGIC_BY_MAJOR.items() if magic == self.magic), None)


def parse_segment_header(head: bytes | memoryview) -> SegmentHeader:
    """Read the long header from the first 40 bytes of a segment.

    Raises:
        ValueError: It is too short, or has no long header.

    Source: XLogLongPageHeaderData in PostgreSQL's src/include/access/xlog_internal.h.
    """
    if len(head) < LONG_HEADER_BYTES:
        raise ValueError(f"a WAL segment of {len(head)} bytes has no header")
    magic, info, timeline, address, _remaining, system_identifier, segment_bytes, page_bytes = _LONG_HEADER.unpack_from(
        head
    )
    if not info & LONG_HEADER_FLAG:
        raise ValueError("its first page has no long header")
    return SegmentHeader(magic, timeline, address, system_identifier, segment_bytes, page_bytes)


def segment_problem(name: str, size: int, head: bytes | memoryview, system_identifier: int | None) -> str | None:
    """Say why the file of `size` bytes beginning with `head` cannot be the WAL segment `name`, or None if it can.

    Args:
        name: Name of a segment or of a partial segment.
        size: The file's size in bytes.
        head: At least its first 40 bytes.
        system_identifier: The database cluster it must belong to; None accepts any.

    Source: XLogReaderValidatePageHeader() in PostgreSQL's src/backend/access/transam/xlogreader.c.
    """
    try:
        header = parse_segment_header(head)
    except ValueError as error:
        return str(error)
    if header.major_version is None:
        return f"its magic {header.magic:04X} is of no PostgreSQL version from 13 to 18"
    if not is_segment_size(header.segment_bytes) or header.segment_bytes != size:
        return f"it has {size} bytes, but its header says {header.segment_bytes}"
    if system_identifier is not None and header.system_identifier != system_identifier:
        return f"it belongs to the database cluster {header.system_identifier}, not to {system_identifier}"
    try:
        timeline, start_lsn = parse_segment_name(name[:24], header.segment_bytes)
    except ValueError as error:
        return str(error)
    if header.page_address != start_lsn:
        return f"it begins at {format_lsn(header.page_address)}, but its name says {format_lsn(start_lsn)}"
    if header.timeline > timeline:
        return f"it was written on timeline {header.timeline}, later than the {timeline} of its name"
    return None
