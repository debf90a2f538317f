"""How fast WAL is written and archived, and when the volume it waits on will be full."""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SECONDS = 60.0  # of observation before anything is said
ALARM_SECONDS = 4 * 3600.0  # full in less: the trend is bad
RELIEF_SECONDS = 8 * 3600.0  # a bad trend is good again above this


@dataclass(frozen=True, slots=True)
class WalSample:
    """What was seen at one moment.

    seconds: when, on a clock that never goes back.
    written_bytes: how much WAL had been written: an LSN.
    archived_bytes: how much the agent had archived since it began.
    kept_bytes: WAL that PostgreSQL may not recycle, because it has not been told that it is archived.
    """

    seconds: float
    written_bytes: int
    archived_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class WalTrend:
    """Bytes a second. `seconds_until_full` is None if the volume does not fill up with WAL."""

    written_rate: float
    archived_rate: float
    kept_rate: float
    seconds_until_full: float | None


def wal_trend(samples: Sequence[WalSample], free_bytes: int) -> WalTrend | None:
    """Return the trend over `samples`, oldest first, or None if they span less than a minute.

    What is kept rises and falls with every segment. So the least of the later half of the time is compared with the
    least of the earlier half: a backlog that is worked off again and again does not grow.
    """
    if not samples or samples[-1].seconds - samples[0].seconds < LEAST_SECONDS:
        return None
    first, last = samples[0], samples[-1]
    span = last.seconds - first.seconds
    middle = first.seconds + span / 2
    earlier = [sample for sample in samples if sample.seconds < middle]
    later = [sample for sample in samples if sample.seconds >= middle]
    growth = min(sample.kept_bytes for sample in later) - min(sample.kept_bytes for sample in earlier)
    kept_rate = growth / (later[0].seconds - first.seconds)
    return WalTrend(
        written_rate=(last.written_bytes - first.written_bytes) / span,
        archived_rate=(last.archived_bytes - first.archived_bytes) / span,
        kept_rate=kept_rate,
        seconds_until_full=free_bytes / kept_rate if kept_rate > 0 else None,
    )


def is_bad(trend: WalTrend, *, was_bad: bool) -> bool:
    """Tell whether the volume will be full soon; a trend that was bad must be clearly better to be good again."""
    limit = RELIEF_SECONDS if was_bad else ALARM_SECONDS
    return trend.seconds_until_full is not None and trend.seconds_until_full < limit
