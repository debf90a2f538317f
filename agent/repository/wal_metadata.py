"""The user metadata of our WAL objects: what a HEAD tells of a WAL file without its content.

Together about 300 bytes; S3 allows 2 KB. Object stores fold the names to lower case, and some keep none at all.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from agent.domain.lsn import format_lsn, parse_lsn
from agent.domain.wal_times import SegmentTimes, TransactionEnd

DIGEST = "pitr-content-blake3"  # of the plain bytes: another release of a compressor may pack them differently
CONTENT_BYTES = "pitr-content-bytes"
SYSTEM_IDENTIFIER = "pitr-system-identifier"
FIRST_COMMIT = "pitr-first-commit"  # time and LSN of a segment's first and last commit or abort, or "none"
LAST_COMMIT = "pitr-last-commit"

_NO_COMMIT = "none"
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


def wal_metadata(
    digest: str, content_bytes: int, system_identifier: int | None, times: SegmentTimes | None
) -> dict[str, str]:
    """Write the metadata of a WAL file: what is None is left out."""
    metadata = {DIGEST: digest, CONTENT_BYTES: str(content_bytes)}
    if system_identifier is not None:
        metadata[SYSTEM_IDENTIFIER] = str(system_identifier)
    if times is not None:
        metadata |= {FIRST_COMMIT: _written(times.first), LAST_COMMIT: _written(times.last)}
    return metadata


def read_times(metadata: Mapping[str, str]) -> SegmentTimes | None:
    """Read the times of a segment; None if the metadata does not tell them in the form written above."""
    try:
        return SegmentTimes(_read(metadata[FIRST_COMMIT]), _read(metadata[LAST_COMMIT]))
    except (KeyError, ValueError):
        return None


def read_content_bytes(metadata: Mapping[str, str]) -> int | None:
    """Read the size of a WAL file's plain content; None if the metadata does not tell it."""
    text = metadata.get(CONTENT_BYTES, "")
    return int(text) if text.isascii() and text.isdigit() else None


def _written(end: TransactionEnd | None) -> str:
    return _NO_COMMIT if end is None else f"{end.time.strftime(_TIME)} {format_lsn(end.lsn)}"


def _read(text: str) -> TransactionEnd | None:
    if text == _NO_COMMIT:
        return None
    time, lsn = text.split(" ")
    return TransactionEnd(parse_lsn(lsn), datetime.strptime(time, _TIME).replace(tzinfo=UTC))
