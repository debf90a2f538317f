"""What `backup_label`, `tablespace_map` and a backup history file say."""

import re
from dataclasses import dataclass

from agent.domain.lsn import parse_lsn

_START = re.compile(r"^START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) \(file ([0-9A-F]{24})\)$", re.MULTILINE)
_CHECKPOINT = re.compile(r"^CHECKPOINT LOCATION: ([0-9A-F]+/[0-9A-F]+)$", re.MULTILINE)
_TIMELINE = re.compile(r"^START TIMELINE: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BackupLabel:
    """Where replay of a base backup begins."""

    start_lsn: int
    start_segment: str
    checkpoint_lsn: int
    timeline: int


def parse_backup_label(text: str) -> BackupLabel:
    """Read the fields that recovery needs from a `backup_label`.

    Raises:
        ValueError: A line that PostgreSQL insists on is missing.

    Source: read_backup_label() in PostgreSQL's src/backend/access/transam/xlogrecovery.c.
    """
    start, checkpoint, timeline = _START.search(text), _CHECKPOINT.search(text), _TIMELINE.search(text)
    if start is None or checkpoint is None or timeline is None:
        raise ValueError("backup_label lacks its start, checkpoint or timeline line")
    return BackupLabel(parse_lsn(start[1]), start[2], parse_lsn(checkpoint[1]), int(timeline[1]))


def backup_history_name(start_segment: str, start_lsn: int, segment_bytes: int) -> str:
    """Name the backup history file that PostgreSQL archives at the end of a backup.

    Source: BackupHistoryFileName() in PostgreSQL's src/include/access/xlog_internal.h.
    """
    return f"{start_segment}.{start_lsn % segment_bytes:08X}.backup"


def parse_tablespace_map(text: str) -> dict[int, str]:
    """Read a `tablespace_map`: tablespace OID to the directory it was in.

    Source: read_tablespace_map() in PostgreSQL's src/backend/access/transam/xlogrecovery.c; a backslash escapes
    a newline, a carriage return or itself.
    """
    result: dict[int, str] = {}
    for oid, path in re.findall(r"(\d+) ((?:[^\\\n]|\\.)*)\n?", text, re.DOTALL):
        result[int(oid)] = re.sub(r"\\(.)", r"\1", path, flags=re.DOTALL)
    return result
