"""Statuses of made-up agents, for tests of what shows them."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from agent.telemetry.findings import find
from agent.telemetry.status import (
    AgentStatus,
    BackupsStatus,
    CompleteBackup,
    Drill,
    DrilledBackup,
    DrillsStatus,
    ExpiryStatus,
    FailedBackup,
    FailedDrill,
    Failure,
    MemoryStatus,
    NextBackup,
    RangeStatus,
    ReadBackup,
    ReadingStatus,
    RunningBackup,
    RunningReading,
    StoreStatus,
    TimelineStatus,
    VerificationStatus,
    WalGap,
    WalStatus,
    WindowStatus,
)

NOW = datetime(2026, 11, 23, 9, 30, 12, tzinfo=UTC)
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)> {{ 7 * 7 }} </style>"


def with_findings(status: AgentStatus) -> AgentStatus:
    """Return `status` as the agent would give it."""
    return replace(status, findings=find(status))


def base_backup(
    days: float, number: int, *, parent: CompleteBackup | None = None, pinned: bool = False
) -> CompleteBackup:
    """Return a base backup that finished `days` ago."""
    finish, suffix = NOW - days * DAY, "" if parent is None else f"_D_{parent.name[5:29]}"
    return CompleteBackup(
        name=f"base_{number:024X}{suffix}",
        kind="full" if parent is None else "delta",
        start_time=finish - timedelta(minutes=14 if parent is None else 2),
        finish_time=finish,
        size_bytes=(92 << 30) if parent is None else 3 << 30,
        stored_bytes=(31 << 30) if parent is None else 900 << 20,
        timeline=1,
        parent=None if parent is None else parent.name,
        permanent=pinned,
    )


def week() -> tuple[CompleteBackup, ...]:
    """Return the base backups of a week, newest first: one full, a delta on each other day."""
    chain = [base_backup(7.3, 1 << 33)]
    for day in range(1, 8):
        chain.append(base_backup(7.3 - day, (1 << 33) + 40 * day, parent=chain[-1]))
    return tuple(reversed(chain))


def reach(backup: CompleteBackup, to_time: datetime) -> RangeStatus:
    """Return the range that begins with `backup`."""
    return RangeStatus(backup.name, backup.finish_time, "2/1000028", to_time, "2/F0001A8")


def drills(*drilled: DrilledBackup) -> DrillsStatus:
    """Return what is known if these base backups have had drills."""
    succeeded = [each.succeeded for each in drilled if each.succeeded is not None]
    failed = [each.failed for each in drilled if each.failed is not None]
    return DrillsStatus(
        max(succeeded, key=lambda drill: drill.at, default=None),
        max(failed, key=lambda drill: drill.at, default=None),
        drilled,
    )


def window(*timelines: TimelineStatus, missing: tuple[WalGap, ...] = ()) -> WindowStatus:
    """Return a window of which the last of `timelines` is the latest."""
    current = timelines[-1].ranges[-1] if timelines else None
    return WindowStatus(
        backup=None if current is None else current.backup,
        from_time=None if current is None else current.from_time,
        to_time=None if current is None else current.to_time,
        gaps=len(missing),
        missing_segments=sum(gap.segments for gap in missing),
        system_identifier=7441234567890123456,
        latest=timelines[-1].timeline if timelines else None,
        timelines=timelines,
        missing=missing,
        looked_at=NOW - timedelta(seconds=31),
    )


def healthy() -> AgentStatus:
    """Return the status of an agent to which nothing is wrong."""
    catalog = week()
    names = tuple(backup.name for backup in reversed(catalog))
    reached = reach(catalog[-1], NOW - timedelta(seconds=19))
    wal = WalStatus(
        last_archived="000000010000000200000118",
        last_fetched=None,
        backlog_files=1,
        backlog_bytes=16 << 20,
        backlog_oldest_seconds=0.4,
        gaps=(),
        last_archived_at=NOW - timedelta(seconds=4),
        is_primary=True,
        written_bytes_per_second=3_400_000.0,
        archived_bytes_per_second=3_380_000.0,
        volume_free_bytes=212 << 30,
    )
    backups = BackupsStatus(
        schedule="0 2 * * *",
        take_from="primary",
        complete=len(catalog),
        looked_at=NOW,
        newest=(catalog[0], catalog[-1]),
        running=None,
        last_failure=None,
        next=NextBackup(NOW.replace(hour=2, minute=0, second=0) + DAY, "scheduled"),
        waiting_for=None,
        catalog=catalog,
    )
    return with_findings(
        AgentStatus(
            mode="archive",
            version="0.1.0",
            started_at=NOW - 3 * DAY,
            now=NOW,
            wal=wal,
            backups=backups,
            window=window(TimelineStatus(1, None, (reached,), names)),
            store=StoreStatus(NOW - timedelta(seconds=2), None, "", NOW + 40 * MINUTE, None),
            memory=MemoryStatus(256 << 20, 32 << 20),
            expiry=ExpiryStatus("7d", 7 * 86400.0, NOW - 7 * HOUR, None),
            verification=VerificationStatus(NOW - 7 * HOUR, names, 0, (), None),
            reading=ReadingStatus(
                "0 5 * * *",
                1 << 40,
                None,
                NOW - 4 * HOUR,
                None,
                NOW + 20 * HOUR,
                0,
                (),
                tuple(ReadBackup(name, NOW - 4 * HOUR if name != names[-1] else None, ()) for name in names),
            ),
            drills=drills(
                DrilledBackup(
                    names[-3],
                    Drill(names[-3], NOW - 2 * DAY, NOW - 2 * DAY - 3 * HOUR, 1384.2),
                    FailedDrill(names[-3], NOW - 2 * DAY - 2 * HOUR, 51),
                )
            ),
        )
    )


def running() -> AgentStatus:
    """Return a healthy status with a base backup on its way."""
    work = RunningBackup(
        "full", "asked for", True, NOW - 6 * MINUTE, 360.0, "copying files",
        41 << 30, 92 << 30, 0.4457, 118 << 20, 443.0,
    )  # fmt: skip
    status = healthy()
    return with_findings(replace(status, backups=replace(status.backups, running=work)))


def broken() -> AgentStatus:
    """Return the status of an agent whose store went away, with a gap, a branch that was left, and old backups."""
    status, catalog = healthy(), week()[3:]
    gap = WalGap("000000010000000200000070", "000000010000000200000078", 9)
    before = reach(catalog[-1], catalog[1].finish_time - 8 * HOUR)
    after = reach(catalog[1], NOW - 40 * MINUTE)
    old = TimelineStatus(1, None, (before,), (catalog[-1].name, catalog[-2].name))
    new = TimelineStatus(2, 1, (before, after), tuple(backup.name for backup in reversed(catalog)))
    away = "upload wal_005/000000020000000200000119.zst: connection refused. Check AWS_ENDPOINT and the network"
    wal = replace(
        status.wal,
        last_archived="000000020000000200000118",
        last_archived_at=NOW - 40 * MINUTE,
        backlog_files=217,
        backlog_bytes=217 << 24,
        backlog_oldest_seconds=2391.0,
        gaps=(gap,),
        failure=Failure(NOW - timedelta(seconds=3), away),
        archived_bytes_per_second=0.0,
        seconds_until_full=5200.0,
        volume_free_bytes=17 << 30,
    )
    backups = replace(
        status.backups, catalog=catalog, complete=len(catalog), newest=(catalog[0], catalog[-1]),
        last_failure=FailedBackup(NOW - 7 * HOUR, "the store is away", 3), waiting_for=away,
    )  # fmt: skip
    return with_findings(
        replace(
            status,
            wal=wal,
            backups=backups,
            window=window(old, new, missing=(gap,)),
            store=StoreStatus(NOW - 40 * MINUTE, NOW - 39 * MINUTE, away, None, None),
            memory=MemoryStatus(256 << 20, 255 << 20),
            expiry=ExpiryStatus("7d", 7 * 86400.0, None, Failure(NOW - HOUR, "3 objects could not be removed")),
            verification=VerificationStatus(
                NOW - 7 * HOUR,
                tuple(backup.name for backup in catalog[2:]),
                2,
                (f"{catalog[1].name}: tar part_003.tar.zst is missing", f"{catalog[0].name}: its parent is broken"),
                None,
            ),
            drills=drills(DrilledBackup(catalog[1].name, None, FailedDrill(catalog[1].name, NOW - 5 * HOUR, 51))),
        )
    )


def empty() -> AgentStatus:
    """Return the status of an agent that has just begun with an empty repository."""
    status = healthy()
    nothing = WalStatus(None, None, 0, 0, 0.0, ())
    backups = replace(
        status.backups, catalog=(), newest=(), complete=0, next=None, waiting_for="the first WAL file is to be archived"
    )
    unknown = StoreStatus(None, None, "", None, None)
    return with_findings(
        replace(
            status,
            started_at=NOW,
            wal=nothing,
            backups=backups,
            window=window(),
            store=unknown,
            expiry=None,
            drills=drills(),
        )
    )


def starting() -> AgentStatus:
    """Return the status of an agent that has not seen anything yet."""
    status = empty()
    backups = replace(status.backups, complete=None, looked_at=None, waiting_for="PostgreSQL is not running")
    unverified = VerificationStatus(None, (), 0, (), None)
    return with_findings(
        replace(status, backups=backups, window=None, store=None, memory=None, verification=unverified)
    )


def hostile() -> AgentStatus:
    """Return a status in which every text that can come from outside is an attack on a browser."""
    status = broken()
    evil = replace(status.backups.catalog[0], name=HOSTILE, parent=HOSTILE, kind=HOSTILE)
    timelines = (TimelineStatus(1, None, (reach(evil, NOW),), (HOSTILE,)),)
    gap = WalGap(HOSTILE, HOSTILE, 2)
    working = replace(running().backups.running, kind=HOSTILE, why=HOSTILE, stage=HOSTILE)  # type: ignore[type-var]
    failure = Failure(NOW, HOSTILE)
    return with_findings(
        replace(
            status,
            version=HOSTILE,
            wal=replace(status.wal, last_archived=HOSTILE, gaps=(gap,), failure=failure),
            backups=replace(
                status.backups, catalog=(evil, *status.backups.catalog[1:]), newest=(evil,), running=working,
                last_failure=FailedBackup(NOW, HOSTILE, 1), next=NextBackup(NOW, HOSTILE), waiting_for=HOSTILE,
            ),
            window=window(*timelines, missing=(gap,)),
            store=StoreStatus(NOW, NOW - HOUR, HOSTILE, NOW, HOSTILE),
            expiry=ExpiryStatus(HOSTILE, 7 * 86400.0, NOW, failure),
            verification=VerificationStatus(NOW, (), 1, (HOSTILE,), failure),
            reading=ReadingStatus(
                HOSTILE, 1, RunningReading(1, 4, 0.25), NOW, failure, NOW, 1, (HOSTILE,),
                (ReadBackup(HOSTILE, NOW, (HOSTILE,)),),
            ),
            drills=drills(DrilledBackup(HOSTILE, Drill(HOSTILE, NOW, NOW, 1.0), FailedDrill(HOSTILE, NOW, 51))),
        )
    )  # fmt: skip
