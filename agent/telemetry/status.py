"""How the agent is: one frozen object, read by `/metrics`, `/v1/status`, `pitr status` and whatever shows it.

Each part is given by the service that knows it; `agent.app` puts them together at the moment somebody asks. Times are
aware UTC, sizes bytes, durations seconds. None means that it is not known (yet), or that there is none.
"""

from collections.abc import Mapping
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
class Failure:
    """When something last failed, and why. None stands for: it did not fail since it last went well."""

    at: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class AwaitedWal:
    """A WAL file that recovery has asked for `attempts` times since `since`, and not got an answer yet."""

    name: str
    since: datetime
    attempts: int


@dataclass(frozen=True, slots=True)
class WalStatus:
    """WAL on its way out (archive) and in (fetch).

    failure: of the last attempt to archive.
    is_primary: whether the data directory is that of a primary; None if there is none.
    written_bytes_per_second, archived_bytes_per_second: of the last five minutes, before compression.
    seconds_until_full: when the volume of pg_wal is full if it goes on like this; None if not known, or never.
    """

    last_archived: str | None
    last_fetched: str | None
    backlog_files: int
    backlog_bytes: int
    backlog_oldest_seconds: float
    gaps: tuple[WalGap, ...]
    last_archived_at: datetime | None = None
    failure: Failure | None = None
    is_primary: bool | None = None
    written_bytes_per_second: float | None = None
    archived_bytes_per_second: float | None = None
    volume_free_bytes: int | None = None
    seconds_until_full: float | None = None
    awaited: AwaitedWal | None = None


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """The repository's store, as the requests to it show.

    failing_since: when the attempts that got no answer, or were refused, began; None if the last one was answered.
    credentials_expire_at: None if they do not, or that is not known.
    foreign: why the agent stores nothing here, when the repository is another database cluster's.
    """

    answered_at: datetime | None
    failing_since: datetime | None
    reason: str
    credentials_expire_at: datetime | None
    foreign: str | None


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """The memory budget."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class ExpiryStatus:
    """Expiry by PITR_RETENTION; `retention` and `window_seconds` as it says, None if it does not."""

    retention: str | None
    window_seconds: float | None
    succeeded_at: datetime | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class VerificationStatus:
    """What the last look at every object of the repository found, at `at`.

    whole: names of the base backups that have all they need. problems: how many there are; `first_problems` in words.
    failure: why the repository could not be looked at, if that is so since.
    """

    at: datetime | None
    whole: tuple[str, ...]
    problems: int
    first_problems: tuple[str, ...]
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class ReadBackup:
    """When all of a base backup was last read back, None if never, and what is known to be wrong with its content."""

    name: str
    verified_at: datetime | None
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningReading:
    """How far the reading back that runs has come with what it reads today."""

    done_bytes: int
    total_bytes: int
    ratio: float


@dataclass(frozen=True, slots=True)
class ReadingStatus:
    """Reading the repository's objects back.

    ended_at: when a round last ended. next_at: the next one. failure: why the last one could not be done.
    problems: how much is known to be wrong; `first_problems` in words. backups: all, oldest first.
    """

    schedule: str | None
    bytes_per_day: int
    running: RunningReading | None
    ended_at: datetime | None
    failure: Failure | None
    next_at: datetime | None
    problems: int
    first_problems: tuple[str, ...]
    backups: tuple[ReadBackup, ...]


@dataclass(frozen=True, slots=True)
class Drill:
    """A restore drill that succeeded at `at`: base backup `backup` restored to `moment`, within `seconds`."""

    backup: str
    at: datetime
    moment: datetime
    seconds: float


@dataclass(frozen=True, slots=True)
class FailedDrill:
    """A restore drill of base backup `backup` that failed at `at` with `exit_code`."""

    backup: str
    at: datetime
    exit_code: int


@dataclass(frozen=True, slots=True)
class DrilledBackup:
    """How the last drills of one base backup ended."""

    name: str
    succeeded: Drill | None
    failed: FailedDrill | None


@dataclass(frozen=True, slots=True)
class DrillsStatus:
    """Restore drills, as they noted it in the repository: the last of all, and of each base backup that has had one."""

    succeeded: Drill | None
    failed: FailedDrill | None
    backups: tuple[DrilledBackup, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. `alert` names the section of docs/alerts.md that says more.

    severity: critical (data is at risk: act now) or warning (act today).
    """

    alert: str
    severity: str
    text: str
    what_to_do: str


@dataclass(frozen=True, slots=True)
class RangeStatus:
    """Times that can be reached, any of them, over unbroken WAL, from base backup `backup` on."""

    backup: str
    from_time: datetime
    from_lsn: str
    to_time: datetime
    to_lsn: str


@dataclass(frozen=True, slots=True)
class TimelineStatus:
    """What a restore along one timeline can reach, its ancestors' part included; a WAL gap lies between two ranges.

    backups: names of those that serve there, oldest first.
    """

    timeline: int
    parent: int | None
    ranges: tuple[RangeStatus, ...]
    backups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WindowStatus:
    """What an ordinary restore (TARGET_TIMELINE=latest) can choose from, and what is missing on any timeline.

    backup, from_time, to_time: of the last unbroken range; None if nothing can be restored.
    latest: the timeline that is followed; `timelines`: all, with what each can reach; `missing`: the gaps one by one.
    looked_at: when this was found.
    """

    backup: str | None
    from_time: datetime | None
    to_time: datetime | None
    gaps: int
    missing_segments: int
    system_identifier: int | None = None
    latest: int | None = None
    timelines: tuple[TimelineStatus, ...] = ()
    missing: tuple[WalGap, ...] = ()
    looked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunningBackup:
    """A base backup on its way. `kind` is what was asked for: auto, full, delta. The numbers are of the `stage`.

    `total_bytes` is 0 and `ratio` with it while the total is unknown. `bytes_per_second` is of the last half minute.
    `idle_seconds`: since when it has not come any further.
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
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CompleteBackup:
    """A base backup in the repository, whoever took it. `parent` is what a delta builds on.

    corrupt_pages: pages with a wrong checksum that were found when it was taken.
    """

    name: str
    kind: str
    start_time: datetime
    finish_time: datetime
    size_bytes: int
    stored_bytes: int
    timeline: int = 1
    parent: str | None = None
    permanent: bool = False
    corrupt_pages: int = 0


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
    catalog: all of them, newest first.
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
    catalog: tuple[CompleteBackup, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreStatus:
    """A restore on its way.

    stage: planning, hydrating, replaying or validating; None before and after.
    target, backup, timeline, note: the plan, None before there is one.
    done_bytes, total_bytes, ratio, bytes_per_second, seconds_left: of the stage; the total is 0 while it is unknown.
    replayed_lsn, target_lsn: while it replays, how far the WAL has been handed to PostgreSQL, and the end of the last
        segment that the plan names.
    seconds: how long each stage took that is done.
    """

    stage: str | None
    target: str | None
    backup: str | None
    timeline: int | None
    note: str | None
    done_bytes: int
    total_bytes: int
    ratio: float
    bytes_per_second: float | None
    seconds_left: float | None
    replayed_lsn: str | None
    target_lsn: str | None
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RestoreModeStatus:
    """How an agent in restore mode is, at `now`; its first fields are those of `AgentStatus`."""

    mode: str
    version: str
    started_at: datetime
    now: datetime
    restore: RestoreStatus | None
    awaited: AwaitedWal | None = None
    store: StoreStatus | None = None


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """How an agent in archive mode is, at `now`. `findings`: what is wrong, the worst first."""

    mode: str
    version: str
    started_at: datetime
    now: datetime
    wal: WalStatus
    backups: BackupsStatus
    store: StoreStatus | None = None
    memory: MemoryStatus | None = None
    expiry: ExpiryStatus | None = None
    verification: VerificationStatus | None = None
    reading: ReadingStatus | None = None
    drills: DrillsStatus | None = None
    findings: tuple[Finding, ...] = ()
    window: WindowStatus | None = None


def as_json(status: AgentStatus | RestoreModeStatus | RunningBackup) -> dict[str, Any]:
    """Return the JSON form: the fields by their names, times as RFC 3339 UTC."""
    return {name: _plain(value) for name, value in asdict(status).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return format_time(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
