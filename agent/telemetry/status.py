"""How the agent is: one frozen object, read by `/metrics`, `/v1/status`, `pitr status` and whatever shows it.

Each part is given by the service that knows it; `agent.app` puts them together at the moment somebody asks. Times are
aware UTC, sizes bytes, durations seconds. None means that it is not known (yet), or that there is none.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from agent.domain.restore_target import format_time


@dataclass(frozen=True, slots=True)
class WalGap:
    """Segments missing between archived ones."""

    first_missing: str
    last_missing: str
    segments: int


@dataclass(frozen=True, slots=True)
class WalStatus:
    """WAL on its way out (archive) and in (fetch)."""

    last_archived: str | None
    last_fetched: str | None
    backlog_files: int
    backlog_bytes: int
    backlog_oldest_seconds: float
    gaps: tuple[WalGap, ...]


@dataclass(frozen=True, slots=True)
class WindowStatus:
    """What an ordinary restore (TARGET_TIMELINE=latest) can choose from, and what is missing on any timeline.

    backup, from_time, to_time: of the last unbroken range; None if nothing can be restored.
    """

    backup: str | None
    from_time: datetime | None
    to_time: datetime | None
    gaps: int
    missing_segments: int


@dataclass(frozen=True, slots=True)
class RunningBackup:
    """A base backup on its way. `kind` is what was asked for: auto, full, delta. The numbers are of the `stage`.

    `total_bytes` is 0 and `ratio` with it while the total is unknown. `bytes_per_second` is of the last half minute.
    """

    kind: str
    why: str
    permanent: bool
    started_at: datetime
    seconds: float
    stage: str
    done_bytes: int
    total_bytes: int
    ratio: float
    bytes_per_second: float | None
    seconds_left: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form, as in that of `AgentStatus`."""
        return as_json(self)


@dataclass(frozen=True, slots=True)
class CompleteBackup:
    """The newest base backup of a kind in the repository, whoever took it."""

    name: str
    kind: str
    start_time: datetime
    finish_time: datetime
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class FailedBackup:
    """The last attempt of this agent that failed, and how many did in a row. A success since clears it not."""

    at: datetime
    reason: str
    in_a_row: int


@dataclass(frozen=True, slots=True)
class NextBackup:
    """When this agent takes the next base backup by itself, and why."""

    at: datetime
    why: str


@dataclass(frozen=True, slots=True)
class BackupsStatus:
    """Base backups: what is there, what runs, what comes.

    complete: how many the repository held when it was last seen, at `looked_at`.
    newest: of each kind there is, newest first.
    waiting_for: what keeps a base backup from being taken or planned, in words.
    """

    schedule: str | None
    take_from: str
    complete: int | None
    looked_at: datetime | None
    newest: tuple[CompleteBackup, ...]
    running: RunningBackup | None
    last_failure: FailedBackup | None
    next: NextBackup | None
    waiting_for: str | None


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """All of it, as it was at `now`."""

    mode: str
    version: str
    started_at: datetime
    now: datetime
    wal: WalStatus
    backups: BackupsStatus
    window: WindowStatus | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form: the fields by their names, times as RFC 3339 UTC."""
        return as_json(self)


def as_json(status: AgentStatus | RunningBackup) -> dict[str, Any]:
    """Return the JSON form: the fields by their names, times as RFC 3339 UTC."""
    return {name: _plain(value) for name, value in asdict(status).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return format_time(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
