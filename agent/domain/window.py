"""What can be restored: for each timeline from when to when, and where WAL is missing.

`restorable_window(holdings)` is the whole interface. It asks for the times of a few segments (`agent.domain.wal_search`
says how; `agent.repository.wal_index.WalIndex.follow` answers), and may be asked about holdings that are not there, so
that expiry can tell what the window will be.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from agent.domain.archived_path import ArchivedPath, Holdings
from agent.domain.catalog import Backup
from agent.domain.timeline import newest_timeline
from agent.domain.wal import segment_position
from agent.domain.wal_runs import WalRun
from agent.domain.wal_search import Rules, last_transaction


@dataclass(frozen=True, slots=True)
class RestorableRange:
    """Times and LSNs that can be reached, any of them, over unbroken WAL.

    backup: the base backup that it begins with; others may lie in it.
    from_time, from_lsn: where that backup is consistent.
    to_time, to_lsn: the last transaction that the WAL up to the next gap shows; the same as `from_...` if none ended
        after the backup: then only this state can be reached.
    """

    backup: str
    from_time: datetime
    from_lsn: int
    to_time: datetime
    to_lsn: int

    @property
    def is_one_state(self) -> bool:
        """Whether no transaction ended after the backup, so that there is no choice of a moment."""
        return self.to_lsn == self.from_lsn


@dataclass(frozen=True, slots=True)
class TimelineWindow:
    """What a restore along one timeline can reach, its ancestors' part included.

    parent, switch_lsn: the timeline that it left, and where; None for the first one, or if its history is not archived.
    ranges: in order; a WAL gap lies between two.
    """

    timeline: int
    parent: int | None
    switch_lsn: int | None
    ranges: tuple[RestorableRange, ...]


@dataclass(frozen=True, slots=True)
class WalGap:
    """Segments that are missing between archived ones, on `timeline`; none before the oldest base backup counts."""

    timeline: int
    first_missing: str
    last_missing: str
    segments: int


@dataclass(frozen=True, slots=True)
class Window:
    """What a repository can restore.

    latest: the timeline that a restore follows unless told otherwise, None if nothing is held.
    timelines: ascending, those with base backups or WAL.
    """

    system_identifier: int | None
    latest: int | None
    timelines: tuple[TimelineWindow, ...]
    gaps: tuple[WalGap, ...]

    @property
    def current(self) -> RestorableRange | None:
        """The last unbroken range of the latest timeline: what an ordinary restore now has to choose from."""
        ranges = next((each.ranges for each in self.timelines if each.timeline == self.latest), ())
        return ranges[-1] if ranges else None


def restorable_window(held: Holdings) -> Rules[Window]:
    """Work out what can be restored."""
    timelines: list[TimelineWindow] = []
    gaps: dict[str, WalGap] = {}
    known = sorted({*held.histories, *held.wal, *(backup.timeline for backup in held.backups)})
    for timeline in known:
        path = ArchivedPath(held, timeline)
        ranges = yield from restorable_ranges(path, held.backups)
        ancestors = held.histories.get(timeline, ())
        parent, switch_lsn = (ancestors[-1].timeline, ancestors[-1].switch_lsn) if ancestors else (None, None)
        timelines.append(TimelineWindow(timeline, parent, switch_lsn, ranges))
        gaps |= {gap.first_missing: gap for gap in _gaps(path, held)}
    return Window(
        system_identifier=next((b.system_identifier for b in reversed(held.backups) if b.system_identifier), None),
        latest=latest_timeline(held) if known else None,
        timelines=tuple(timelines),
        gaps=tuple(gaps[first] for first in sorted(gaps)),
    )


def latest_timeline(held: Holdings) -> int:
    """Return PostgreSQL's `latest`: from the highest with a base backup on, the highest that histories lead to."""
    return newest_timeline(held.histories, max((backup.timeline for backup in held.backups), default=1))


def restorable_ranges(path: ArchivedPath, backups: Sequence[Backup]) -> Rules[tuple[RestorableRange, ...]]:
    """Return what can be reached on `path` from those of `backups` that serve there; one range a run of WAL."""
    serving = [backup for backup in backups if path.serves(backup)]
    ranges: list[RestorableRange] = []
    for run in path.runs:
        first = _first_in(run, serving)
        if first is not None:
            ranges.append((yield from _range_from(first, run)))
    return tuple(ranges)


def window_begin(held: Holdings) -> datetime | None:
    """Return from when on every moment up to the end of the latest timeline's WAL can be restored; None if none can."""
    path = ArchivedPath(held, latest_timeline(held))
    serving = [backup for backup in held.backups if path.serves(backup)]
    first = _first_in(path.runs[-1], serving) if path.runs else None
    return None if first is None else first.finish_time


def _first_in(run: WalRun, serving: Iterable[Backup]) -> Backup | None:
    inside = [backup for backup in serving if run.holds(backup.start_lsn, backup.finish_lsn)]
    return min(inside, key=lambda backup: backup.finish_lsn, default=None)


def _range_from(backup: Backup, run: WalRun) -> Rules[RestorableRange]:
    last = (yield from last_transaction(run, run.index(backup.finish_lsn - 1))).end
    to_time, to_lsn = backup.finish_time, backup.finish_lsn
    if last is not None and last.lsn >= backup.finish_lsn:
        to_time, to_lsn = max(last.time, to_time), last.lsn
    return RestorableRange(backup.name, backup.finish_time, backup.finish_lsn, to_time, to_lsn)


def _gaps(path: ArchivedPath, held: Holdings) -> list[WalGap]:
    oldest = min((backup.start_lsn for backup in held.backups), default=None)
    gaps: list[WalGap] = []
    for run in path.runs:
        if run.hole is None or oldest is None or run.end_lsn <= oldest:
            continue
        first = segment_position(run.hole.first, held.segment_bytes)
        last = segment_position(run.hole.last, held.segment_bytes)
        assert first is not None
        assert last is not None
        gaps.append(WalGap(first[0], run.hole.first, run.hole.last, last[1] - first[1] + 1))
    return gaps
