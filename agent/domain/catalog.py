"""The catalog: what base backups a repository holds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from agent.domain.wal import segment_name

_NAME = re.compile(r"base_([0-9A-F]{24})(?:_D_([0-9A-F]{24}))?(?:_[0-9A-F]{8})?")


@dataclass(frozen=True, slots=True)
class Backup:
    """One complete base backup (its sentinel exists).

    Times are aware UTC, positions LSNs, sizes bytes. `modified_at` is the store's time of the sentinel. `start_time`
    and `finish_time` are what the backup's metadata says (`modified_at` where there is none). `parent` and `full` are
    names, None for a full backup. `catalog_bytes` is what it restores to, 0 if it does not say: unlike `size_bytes` it
    counts a delta's unchanged files, too. `corrupt_pages`: how many pages of that had wrong checksums when it was
    taken; 0 also where nobody looked. `counts_corrupt_pages`: it says so itself, as none of WAL-G's does; a delta that
    does not is taken to have as many as its parent. `libc`: version of the C library that its server sorted text by,
    None if not told. `config_outside`: configuration files of the server that are not in it.
    """

    name: str
    timeline: int
    start_lsn: int
    finish_lsn: int
    start_time: datetime
    finish_time: datetime
    modified_at: datetime
    pg_version: int
    system_identifier: int | None
    size_bytes: int
    stored_bytes: int
    permanent: bool
    parent: str | None
    full: str | None
    delta_count: int
    catalog_bytes: int = 0
    corrupt_pages: int = 0
    counts_corrupt_pages: bool = False
    libc: str | None = None
    config_outside: tuple[str, ...] = ()

    @property
    def is_delta(self) -> bool:
        """Whether this backup needs its parent to be restored."""
        return self.parent is not None

    @property
    def start_segment(self) -> str:
        """Name of the WAL segment from which replay begins."""
        return self.name[5:29]


def is_backup_name(name: str) -> bool:
    """Tell whether WAL-G's commands take `name` for a base backup's. Source: WAL-G's regexp of `delete`."""
    return _NAME.fullmatch(name) is not None


def begins_in(start_segment: str, start_lsn: int, segment_bytes: int) -> bool:
    """Tell whether a base backup that begins at `start_lsn` is named after `start_segment`.

    One taken on a standby is named after the segment of the byte before.
    """
    timeline = int(start_segment[:8], 16)
    positions = (start_lsn, max(start_lsn - 1, 0))
    return any(segment_name(timeline, lsn, segment_bytes) == start_segment for lsn in positions)


def ancestors(backup: Backup, by_name: Mapping[str, Backup]) -> list[Backup]:
    """Return what `backup` builds on, its parent first, as far as it is in `by_name`."""
    found: list[Backup] = []
    parent = by_name.get(backup.parent or "")
    while parent is not None and parent not in found:
        found.append(parent)
        parent = by_name.get(parent.parent or "")
    return found
