"""How long a restore will take, by what an earlier one of the same repository took."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from agent.domain.restore_plan import RestorePlan

ASSUMED_REPLAY_RATE = 32 << 20
"""Bytes of WAL a second where none were measured: two segments of 16 MiB. Replay is one process and often waits for a
page: 20 to 200 MiB a second are usual."""

TELLING_BYTES = 64 << 20
"""What takes less than this to download, or to replay, tells of the start of programs rather than of a rate."""


@dataclass(frozen=True, slots=True)
class RestoreRates:
    """What a restore measured: a rate in bytes a second, or None where it had too little to do.

    hydrate: of the base backups, as stored. replay: of WAL, fetched meanwhile; whole segments are counted.
    """

    measured_at: datetime
    hydrate: float | None
    replay: float | None


def rates_of(
    measured_at: datetime, hydrated: tuple[int, float | None], replayed: tuple[int, float | None]
) -> RestoreRates:
    """Return the rates of a restore that moved so many bytes in so many seconds, each."""

    def rate(size: int, seconds: float | None) -> float | None:
        return size / seconds if seconds and size >= TELLING_BYTES else None

    return RestoreRates(measured_at, rate(*hydrated), rate(*replayed))


@dataclass(frozen=True, slots=True)
class RestoreEstimate:
    """How long the two long stages of a restore take.

    hydrate_seconds: None if no restore has measured it.
    replay_seconds: by `ASSUMED_REPLAY_RATE` if no restore has measured it.
    hydrate_measured_at, replay_measured_at: when the restore that did ended; None: none has.
    """

    hydrate_seconds: float | None
    hydrate_measured_at: datetime | None
    replay_seconds: float
    replay_measured_at: datetime | None


def estimate_restore(plan: RestorePlan, measured: Iterable[RestoreRates]) -> RestoreEstimate:
    """Estimate by the newest of `measured` that tells, each rate for itself."""
    newest_first = sorted(measured, key=lambda rates: rates.measured_at, reverse=True)
    hydrate = next(((each.hydrate, each.measured_at) for each in newest_first if each.hydrate), None)
    replay = next(((each.replay, each.measured_at) for each in newest_first if each.replay), None)
    stored, wal = sum(backup.stored_bytes for backup in plan.chain), len(plan.segments) * plan.segment_bytes
    return RestoreEstimate(
        hydrate_seconds=stored / hydrate[0] if hydrate else None,
        hydrate_measured_at=hydrate[1] if hydrate else None,
        replay_seconds=wal / (replay[0] if replay else ASSUMED_REPLAY_RATE),
        replay_measured_at=replay[1] if replay else None,
    )
