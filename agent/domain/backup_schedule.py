"""When the next base backup is due, and why.

The rule looks at what the repository holds, never at what this process remembers of a success: every agent of a
database cluster comes to the same answer, also one that was away.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from cronsim import CronSim, CronSimError

FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=1)
LATE = timedelta(minutes=10)  # a run that begins later than this is called missed
PRIMARY_PATIENCE = timedelta(minutes=30)  # how long the primary leaves a run to the standbys
STANDBY_SPREAD = timedelta(minutes=2)  # within which the standbys' agents look, one after the other

_MICROSECOND = timedelta(microseconds=1)


class BackupFrom(StrEnum):
    """Which server scheduled base backups are taken of."""

    PRIMARY = "primary"
    STANDBY = "standby"


class Why(StrEnum):
    """Why a base backup is due, or was begun."""

    FIRST = "the repository holds none"
    SCHEDULE = "scheduled"
    MISSED = "a scheduled one was missed"
    WAL_GAP = "WAL is missing since the last one"
    RETRY = "the last attempt failed"
    REQUEST = "asked for"

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for it, or nothing can be restored until it is there."""
        return self in (Why.REQUEST, Why.FIRST, Why.WAL_GAP)


@dataclass(frozen=True, slots=True)
class BackupSchedule:
    """Moments at which base backups begin: those of a cron expression in UTC, all of them `delay` later."""

    cron: str
    delay: timedelta = timedelta()

    def first_after(self, moment: datetime) -> datetime:
        """Return the first one later than `moment`, in UTC."""
        return next(CronSim(self.cron, moment.astimezone(UTC) - self.delay)) + self.delay

    def last_until(self, moment: datetime) -> datetime:
        """Return the last one that is not later than `moment`, in UTC."""
        return next(CronSim(self.cron, moment.astimezone(UTC) - self.delay + _MICROSECOND, reverse=True)) + self.delay


def cron_problem(cron: str) -> str | None:
    """Say what is wrong with a cron expression of five fields, or return None."""
    if len(cron.split()) != 5:
        return "it has not five fields: minute, hour, day of month, month, day of week"
    try:
        next(CronSim(cron, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        return str(error).lower()
    except StopIteration:
        return "no day is like that"
    return None


def spread(name: str, most: timedelta) -> timedelta:
    """Return a share of `most`, in whole seconds, that is always the same for `name` and differs between names."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / (1 << 64)
    return timedelta(seconds=int(share * most.total_seconds()))


@dataclass(frozen=True, slots=True)
class BackupHistory:
    """What the next base backup depends on.

    newest_start, newest_finish: of the newest complete base backup of this database cluster, None if there is none.
    gap_since: when WAL was found missing; a backup that began before does not reach over the gap. None: none is.
    failures, last_failure: attempts of this agent that failed in a row, and the time of the last.
    given_up_at: when somebody cancelled a backup; what was due before is not made up for.
    """

    newest_start: datetime | None = None
    newest_finish: datetime | None = None
    gap_since: datetime | None = None
    failures: int = 0
    last_failure: datetime | None = None
    given_up_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PlannedBackup:
    """The next base backup: when, and why. A moment that has passed means now."""

    at: datetime
    why: Why


def next_backup(schedule: BackupSchedule | None, history: BackupHistory, now: datetime) -> PlannedBackup | None:
    """Return when the next base backup is due; None if never.

    Without a schedule only a gap makes one due. A backup that was still running when a run was due counts as that run.
    After a failure it is tried again later and later, but the next regular run is at its time. What is urgent stays so.
    What this process remembers from the future, because its clock was set back, does not count.
    """
    due, failed, given_up = _due(schedule, history, now), history.last_failure, history.given_up_at
    if given_up is not None and due is not None and due.at <= given_up <= now:
        due = None if schedule is None else PlannedBackup(schedule.first_after(given_up), Why.SCHEDULE)
    if due is None or due.at > now or failed is None or not due.at <= failed <= now or not history.failures:
        return due
    at, why = failed + retry_pause(history.failures), Why.RETRY
    regular = None if schedule is None else schedule.first_after(failed)
    if regular is not None and regular <= at:
        at, why = regular, Why.SCHEDULE
    return PlannedBackup(at, due.why if due.why.is_urgent else why)


def _due(schedule: BackupSchedule | None, history: BackupHistory, now: datetime) -> PlannedBackup | None:
    gap, start, finish = history.gap_since, history.newest_start, history.newest_finish
    if gap is not None and gap <= now and (start is None or start < gap):
        return PlannedBackup(gap, Why.WAL_GAP)
    if schedule is None:
        return None
    last = schedule.last_until(now)
    if finish is None:
        return PlannedBackup(last, Why.FIRST)
    if finish < last:
        return PlannedBackup(last, Why.MISSED if now - last > LATE else Why.SCHEDULE)
    return PlannedBackup(schedule.first_after(max(now, finish)), Why.SCHEDULE)


def retry_pause(failures: int) -> timedelta:
    """Return how long to wait after this many failures in a row (from 1): a minute, doubled each time, to an hour."""
    return min(FIRST_RETRY * (1 << min(failures - 1, 16)), LONGEST_RETRY)


def waits_for_others(why: Why, take_from: BackupFrom, *, is_primary: bool, server: str) -> timedelta | None:
    """Return how long after its time this agent leaves a due base backup to other servers' agents; None: for good.

    `server` names this one among the standbys. With `BackupFrom.STANDBY` the standbys look one after the other, and
    the primary takes what none of them began; what cannot wait it takes at once.
    """
    if is_primary:
        urgent = why in (Why.FIRST, Why.WAL_GAP)
        return PRIMARY_PATIENCE if take_from is BackupFrom.STANDBY and not urgent else timedelta()
    return spread(server, STANDBY_SPREAD) if take_from is BackupFrom.STANDBY else None
