"""Which base backup and which moment a restore drill proves, and what is kept of how drills ended."""

from dataclasses import dataclass
from datetime import datetime

from agent.domain.archived_path import ArchivedPath, Holdings
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.wal_search import Rules
from agent.domain.window import latest_timeline, restorable_ranges


@dataclass(frozen=True, slots=True)
class DrillChoice:
    """The base backup to restore, where to stop, and the moment that this proves."""

    backup: str
    target: RestoreTarget
    moment: datetime


@dataclass(frozen=True, slots=True)
class DrillRecord:
    """How the last drills of one base backup ended; None is what there was none of. Times are aware UTC.

    succeeded_at, moment, milliseconds: of the last that succeeded: the moment that it proved, how long it took.
    failed_at, exit_code: of the last that failed.
    """

    succeeded_at: datetime | None = None
    moment: datetime | None = None
    milliseconds: int | None = None
    failed_at: datetime | None = None
    exit_code: int | None = None


def choose_drill(held: Holdings, share: float) -> Rules[DrillChoice | None]:
    """Choose the newest base backup that can be used on the latest timeline, and a moment after it.

    Args:
        held: What the repository holds.
        share: From 0 up to, not including, 1: how far the moment lies between the end of the base backup and the last
            transaction that its WAL reaches. A number at random makes it a moment at random.

    Returns:
        None if no base backup can be used.
    """
    path = ArchivedPath(held, latest_timeline(held))
    for backup in sorted(held.backups, key=lambda each: each.finish_lsn, reverse=True):
        ranges = yield from restorable_ranges(path, [backup])
        if not ranges:
            continue
        reach = ranges[-1]
        if reach.is_one_state or reach.to_time <= reach.from_time:
            return DrillChoice(backup.name, RestoreTarget(TargetKind.IMMEDIATE), reach.from_time)
        moment = reach.from_time + share * (reach.to_time - reach.from_time)
        return DrillChoice(backup.name, RestoreTarget(TargetKind.TIME, time=moment), moment)
    return None
