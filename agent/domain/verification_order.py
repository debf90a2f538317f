"""What of a repository is read back next: base backup by base backup, each with its share of the WAL.

To a base backup belongs the WAL from where it begins to where the next one does, by name; to the first one what is
older, too. So all WAL has its turn, and what was verified can be noted beside the base backup. A pass over a backup
goes on where it stopped, and begins anew a week after it ended; WAL that has come since is read meanwhile.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from agent.domain.catalog import Backup

AGAIN_AFTER = timedelta(days=7)
MOST_PROBLEMS = 20  # that are noted of a base backup

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class VerificationRecord:
    """How far reading back a base backup and its share of the WAL has come. Times are aware UTC.

    verified_at, problems: when a pass over it last ended, None if none has, and what was wrong by then.
    is_complete: whether the pass that was begun last has ended.
    tars, files, wal_through: of that pass: the tars that were read, how many of the listed files they held, and the
        last WAL file that was read.
    found: what is wrong by that pass.
    read_at, read_bytes: when something of it was last read, and how much on that day (UTC).
    """

    verified_at: datetime | None = None
    problems: tuple[str, ...] = ()
    is_complete: bool = False
    tars: frozenset[str] = frozenset()
    files: int = 0
    wal_through: str = ""
    found: tuple[str, ...] = ()
    read_at: datetime | None = None
    read_bytes: int = 0

    def resumed(self, now: datetime) -> "VerificationRecord":
        """Return the record to go on with: that of a new pass, if it is time for one."""
        if not self.is_complete or self.verified_at is None or now - self.verified_at < AGAIN_AFTER:
            return self
        return replace(self, is_complete=False, tars=frozenset(), files=0, wal_through="", found=())

    def read(self, size: int, problems: Iterable[str], now: datetime) -> "VerificationRecord":
        """Return the record after an object of `size` bytes was read."""
        return replace(
            self,
            found=tuple(dict.fromkeys([*self.found, *problems]))[:MOST_PROBLEMS],
            read_at=now,
            read_bytes=size + self.bytes_on(now),
        )

    def ended(self, now: datetime) -> "VerificationRecord":
        """Return the record when nothing is left to be read."""
        verified_at = self.verified_at if self.is_complete else now
        return replace(self, verified_at=verified_at, problems=self.found, is_complete=True)

    def bytes_on(self, day: datetime) -> int:
        """Return how many bytes of it were read on the day of `day`."""
        return self.read_bytes if self.read_at is not None and self.read_at.date() == day.date() else 0

    @property
    def known_problems(self) -> tuple[str, ...]:
        """What is wrong by the last pass that ended, and by the one under way."""
        return tuple(dict.fromkeys([*self.problems, *self.found]))


def in_turn(backups: Sequence[Backup], records: Mapping[str, VerificationRecord]) -> list[Backup]:
    """Return `backups`, the least recently verified first."""

    def turn(backup: Backup) -> tuple[datetime, datetime]:
        return records[backup.name].verified_at or _LONG_AGO, backup.finish_time

    return sorted(backups, key=turn)


def wal_shares(backups: Sequence[Backup], names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each base backup the names of the WAL files that belong to it, in the order of `names`."""
    first_of: dict[str, str] = {}
    for backup in backups:
        first_of.setdefault(backup.start_segment, backup.name)
    starts = sorted(first_of)
    shares: dict[str, list[str]] = {backup.name: [] for backup in backups}
    if starts:
        for name in names:
            start = starts[max(bisect_right(starts, name[:24]) - 1, 0)]
            shares[first_of[start]].append(name)
    return shares
