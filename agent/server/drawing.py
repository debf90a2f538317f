"""The window as a drawing: what lies where, in percent of a common stretch of time. The page's template paints it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.telemetry.status import AgentStatus, CompleteBackup, TimelineStatus, WindowStatus

_LEAST_PERCENT = 0.4  # however short: a gap must show
_TICKS = 4
_HOUR, _DAY = 3600, 86400
_HOURS, _DAYS = (1, 3, 6, 12), (1, 2, 7, 14, 28, 91, 364)
_STEPS = (1, 5, 15, 60, 300, 900, *(n * _HOUR for n in _HOURS), *(n * _DAY for n in _DAYS))  # seconds


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time. All numbers are percent of the drawing's width."""

    left: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: a base backup, or a label of the time axis."""

    left: float
    title: str
    is_delta: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One timeline: what can be restored, the WAL behind it, the gaps in it, and the base backups."""

    timeline: int
    is_latest: bool
    summary: str
    restorable: tuple[Bar, ...]
    wal: tuple[Bar, ...]
    gaps: tuple[Bar, ...]
    backups: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """The rows, the latest timeline first, and the labels of the axis below them."""

    rows: tuple[Row, ...]
    ticks: tuple[Mark, ...]


def draw(status: AgentStatus) -> Drawing | None:
    """Return the drawing of the window; None if nothing can be restored, or that is not known yet."""
    window = status.window
    drawn = [each for each in window.timelines if each.ranges] if window is not None else []
    if window is None or not drawn:
        return None
    backups = {backup.name: backup for backup in status.backups.catalog}
    scale = _Scale(min(_wal_begin(each, backups) for each in drawn), max(_wal_end(each, status) for each in drawn))
    drawn.sort(key=lambda each: (each.timeline != window.latest, -each.timeline))
    return Drawing(tuple(_row(each, status, window, backups, scale) for each in drawn), scale.ticks())


class _Scale:
    """Places moments between two in percent."""

    def __init__(self, begin: datetime, end: datetime) -> None:
        self.begin = begin
        self.span = max(end - begin, timedelta(seconds=1))

    def at(self, moment: datetime) -> float:
        return round(min(max((moment - self.begin) / self.span, 0.0), 1.0) * 100, 3)

    def bar(self, begin: datetime, end: datetime, title: str) -> Bar:
        left = min(self.at(begin), 100 - _LEAST_PERCENT)
        return Bar(left, round(max(self.at(end) - left, _LEAST_PERCENT), 3), title)

    def ticks(self) -> tuple[Mark, ...]:
        """Return round moments, few enough to be read on a phone."""
        steps = [timedelta(seconds=seconds) for seconds in _STEPS]
        step = next((step for step in steps if self.span / step <= _TICKS), steps[-1])
        day = self.begin.replace(hour=0, minute=0, second=0, microsecond=0)
        first = day + step * -((day - self.begin) // step)
        moments = [first + step * number for number in range(int(self.span / step) + 1)]
        pattern = "%d %b" if step >= timedelta(days=1) else "%H:%M" if step >= timedelta(minutes=1) else "%H:%M:%S"
        return tuple(Mark(self.at(m), f"{m:{pattern}}") for m in moments if self.begin <= m <= self.begin + self.span)


def _row(
    each: TimelineStatus, status: AgentStatus, window: WindowStatus, backups: dict[str, CompleteBackup], scale: _Scale
) -> Row:
    serving = [backups[name] for name in each.backups if name in backups]
    restorable = [
        scale.bar(r.from_time, r.to_time, f"can be restored: {_span(r.from_time, r.to_time)}") for r in each.ranges
    ]
    gaps = [
        scale.bar(before.to_time, after.from_time, f"cannot be restored: {_span(before.to_time, after.from_time)}")
        for before, after in zip(each.ranges, each.ranges[1:], strict=False)
    ]
    return Row(
        timeline=each.timeline,
        is_latest=each.timeline == window.latest,
        summary=_span(each.ranges[0].from_time, each.ranges[-1].to_time),
        restorable=tuple(restorable),
        wal=tuple(_wal(each, status, backups, scale)),
        gaps=tuple(gaps),
        backups=tuple(Mark(scale.at(b.finish_time), _backup_title(b), b.parent is not None) for b in serving),
    )


def _wal(each: TimelineStatus, status: AgentStatus, backups: dict[str, CompleteBackup], scale: _Scale) -> Sequence[Bar]:
    """Return the unbroken WAL: from where its first base backup began on."""
    ends = [*(reach.to_time for reach in each.ranges[:-1]), _wal_end(each, status)]
    begins = [_begin(reach.backup, reach.from_time, backups) for reach in each.ranges]
    return [
        scale.bar(begin, end, f"WAL archived: {_span(begin, end)}") for begin, end in zip(begins, ends, strict=True)
    ]


def _begin(name: str, finished: datetime, backups: dict[str, CompleteBackup]) -> datetime:
    return min(backups[name].start_time, finished) if name in backups else finished


def _wal_begin(each: TimelineStatus, backups: dict[str, CompleteBackup]) -> datetime:
    return _begin(each.ranges[0].backup, each.ranges[0].from_time, backups)


def _wal_end(each: TimelineStatus, status: AgentStatus) -> datetime:
    """Return until when WAL is archived: of the server's own timeline beyond the last transaction, where it is idle."""
    end, last = each.ranges[-1].to_time, status.wal.last_archived
    is_current = last is not None and last.startswith(f"{each.timeline:08X}")
    return max(end, status.wal.last_archived_at) if is_current and status.wal.last_archived_at is not None else end


def _backup_title(backup: CompleteBackup) -> str:
    return f"{backup.kind} base backup {backup.name}, finished {backup.finish_time:%Y-%m-%d %H:%M:%S} UTC"


def _span(begin: datetime, end: datetime) -> str:
    return f"{begin:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC"
