"""The window as the status shows it."""

from datetime import datetime

from agent.domain.archived_path import ArchivedPath
from agent.domain.lsn import format_lsn
from agent.domain.window import RestorableRange
from agent.repository.window import WindowView
from agent.telemetry.status import RangeStatus, TimelineStatus, WalGap, WindowStatus


def window_status(view: WindowView, looked_at: datetime) -> WindowStatus:
    """Return `view`, found at `looked_at`, in the words of the status."""
    window, held = view.window, view.held
    current, timelines = window.current, []
    for each in window.timelines:
        path = ArchivedPath(held, each.timeline)
        serving = tuple(backup.name for backup in held.backups if path.serves(backup))
        timelines.append(TimelineStatus(each.timeline, each.parent, tuple(map(_range, each.ranges)), serving))
    return WindowStatus(
        backup=None if current is None else current.backup,
        from_time=None if current is None else current.from_time,
        to_time=None if current is None else current.to_time,
        gaps=len(window.gaps),
        missing_segments=sum(gap.segments for gap in window.gaps),
        system_identifier=window.system_identifier,
        latest=window.latest,
        timelines=tuple(timelines),
        missing=tuple(WalGap(gap.first_missing, gap.last_missing, gap.segments) for gap in window.gaps),
        looked_at=looked_at,
    )


def _range(reach: RestorableRange) -> RangeStatus:
    return RangeStatus(
        reach.backup, reach.from_time, format_lsn(reach.from_lsn), reach.to_time, format_lsn(reach.to_lsn)
    )
