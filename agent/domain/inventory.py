"""What a repository holds, for rules that judge it as a whole: what leads where, and what of it is intact."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from functools import cached_property

from agent.domain.archived_path import Holdings
from agent.domain.catalog import Backup, ancestors
from agent.domain.timeline import Ancestor, Stretch, path_to
from agent.domain.wal import segment_position
from agent.domain.wal_runs import merged, ranges_on_path


class Trust(IntEnum):
    """What is known against a base backup, beside what `TimelineMap.problem` says."""

    DAMAGED = 0
    CORRUPT_PAGES = 1
    SOUND = 2


@dataclass(frozen=True, slots=True)
class TimelineWal:
    """Archived segments of one timeline: numbers (start LSN by segment size), ascending.

    first_written_at, last_written_at: when the first and the last of its WAL files were stored, history included.
    """

    held: Sequence[range]
    first_written_at: datetime
    last_written_at: datetime


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a repository holds. Times are aware UTC.

    now: no later than the store's own clock. wal: by timeline. unfinished: names of backups without a sentinel that may
    be in progress. restoring: names of backups that are being restored. segment_bytes: `wal_segment_size`.
    damaged: names of backups of which something is known to be lost or altered in the repository.
    """

    now: datetime
    backups: Sequence[Backup]
    histories: Mapping[int, Sequence[Ancestor]]
    wal: Mapping[int, TimelineWal]
    segment_bytes: int
    unfinished: Collection[str] = ()
    restoring: Collection[str] = ()
    damaged: Collection[str] = ()

    def is_built_on(self, backup: Backup) -> bool:
        """Tell whether a delta that may be in progress builds on `backup`."""
        return any(name[5:29] != name[-24:] == backup.start_segment for name in self.unfinished)

    def holdings(self, backups: Sequence[Backup]) -> Holdings:
        """Return what restores can use while these are the base backups."""
        wal = {timeline: each.held for timeline, each in self.wal.items()}
        return Holdings(backups, self.histories, wal, self.segment_bytes)


class TimelineMap:
    """Timelines, the WAL on the way to each, and the chains of base backups, of one inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._by_name = {backup.name: backup for backup in inventory.backups}
        self._held: dict[int, list[range]] = {}
        self.timelines = sorted(
            {1, *inventory.histories, *inventory.wal, *(backup.timeline for backup in inventory.backups)}
            | {int(name[5:13], 16) for name in inventory.unfinished}
        )

    @cached_property
    def last_written(self) -> int | None:
        """The timeline that WAL was stored of last."""
        wal = self._inventory.wal
        return max(wal, key=lambda timeline: (wal[timeline].last_written_at, timeline), default=None)

    def written_since(self, begin: datetime) -> set[int]:
        """Return the timelines that were written after `begin`, and the one that was current then.

        That is not told by its WAL, should nothing have been written for long: it is the highest that there was, or,
        where another cluster began again with timeline 1, the one that had been written last.
        """
        wal = self._inventory.wal
        result = {timeline for timeline, each in wal.items() if each.last_written_at > begin}
        there = sorted(timeline for timeline, each in wal.items() if each.first_written_at <= begin)
        if there and there[-1] not in result:
            result |= {there[-1], max(set(there) - result, key=lambda timeline: wal[timeline].last_written_at)}
        return result

    def numbers(self, backup: Backup) -> range:
        """Return the segments that make `backup` consistent; it begins in the one that it is named after."""
        size = self._inventory.segment_bytes
        position = segment_position(backup.start_segment, size)
        first = backup.start_lsn // size
        return range(first if position is None else min(first, position[1]), -(-backup.finish_lsn // size))

    def path(self, timeline: int) -> tuple[Stretch, ...]:
        """Return the way to the end of `timeline`."""
        return path_to(timeline, self._inventory.histories.get(timeline, ()))

    def stretches_from(self, timeline: int, lsn: int, target: int) -> Sequence[Stretch]:
        """Return the stretches of the way to `target` from `lsn` on `timeline` on; none if it does not lead there."""
        path = self.path(target)
        index = next((i for i, stretch in enumerate(path) if stretch.timeline == timeline), None)
        if index is None:
            is_unknown = target > timeline and target > 1 and target not in self._inventory.histories
            return [Stretch(target, lsn, None)] if is_unknown else []
        end = path[index].to_lsn
        return path[index:] if end is None or lsn <= end else []

    def leads_to(self, backup: Backup, timeline: int) -> bool:
        """Tell whether recovery from `backup` can follow to the end of `timeline`."""
        on_path = any(stretch.timeline == backup.timeline for stretch in self.path(timeline))
        return on_path and bool(self.stretches_from(backup.timeline, backup.finish_lsn, timeline))

    def held_on_path(self, timeline: int) -> list[range]:
        """Return the archived segments on the way to `timeline`, see `ranges_on_path`."""
        if timeline not in self._held:
            present = {each: wal.held for each, wal in self._inventory.wal.items()}
            on_path = ranges_on_path(self.path(timeline), present, self._inventory.segment_bytes)
            self._held[timeline] = merged(on_path)
        return self._held[timeline]

    def ancestors(self, backup: Backup) -> list[Backup]:
        """Return what `backup` builds on, its parent first, as far as it is there."""
        return ancestors(backup, self._by_name)

    def chain(self, backup: Backup) -> list[Backup] | None:
        """Return `backup` and all that it builds on, the full one last; None if one is missing."""
        chain = [backup, *self.ancestors(backup)]
        return None if chain[-1].is_delta else chain

    def problem(self, backup: Backup, timeline: int) -> str | None:
        """Say why `backup` cannot be made consistent on the way to `timeline`, None if it can."""
        if self.chain(backup) is None:
            return f"it builds on {backup.parent}, which is missing or incomplete"
        own = self.numbers(backup)
        if not any(each.start <= own.start and own.stop <= each.stop for each in self.held_on_path(timeline)):
            return "WAL that makes it consistent is missing"
        return None

    def trust(self, backup: Backup) -> Trust:
        """Return how far `backup` can be trusted.

        Corrupt pages of its parent do not count: what was damaged there a delta of ours stores whole, and counts anew.
        One of WAL-G's has them as its own, see `Backup`.
        """
        if any(each.name in self._inventory.damaged for each in (backup, *self.ancestors(backup))):
            return Trust.DAMAGED
        return Trust.CORRUPT_PAGES if backup.corrupt_pages else Trust.SOUND

    def intact(self, backup: Backup) -> bool:
        """Tell whether `backup` can be made consistent on some way."""
        return any(
            self.leads_to(backup, timeline) and self.problem(backup, timeline) is None for timeline in self.timelines
        )
