"""What is called wrong, and when."""

from dataclasses import replace
from datetime import datetime

import pytest

from agent.telemetry.findings import find
from agent.telemetry.status import (
    AgentStatus,
    Drill,
    DrilledBackup,
    FailedBackup,
    FailedDrill,
    Failure,
    MemoryStatus,
    RangeStatus,
    StoreStatus,
    TimelineStatus,
    VerificationStatus,
    WalGap,
)
from tests.support.statuses import (
    DAY,
    HOUR,
    MINUTE,
    NOW,
    broken,
    drills,
    empty,
    healthy,
    running,
    starting,
    week,
    window,
)


def alerts(status: AgentStatus) -> list[str]:
    return [finding.alert for finding in find(status)]


def with_wal(**changes: object) -> AgentStatus:
    status = healthy()
    return replace(status, wal=replace(status.wal, **changes))  # type: ignore[arg-type]


def test_nothing_is_wrong_with_a_healthy_or_a_starting_agent() -> None:
    assert alerts(healthy()) == alerts(running()) == alerts(starting()) == []


def test_an_empty_repository_has_no_base_backup() -> None:
    assert alerts(empty()) == ["PitrNoBaseBackup"]


@pytest.mark.parametrize(
    ("changes", "alert"),
    [
        ({"backlog_files": 3, "backlog_oldest_seconds": 301.0}, "PitrArchiveBacklogOld"),
        ({"seconds_until_full": 7100.0}, "PitrWalVolumeFillsUp"),
        ({"last_archived_at": NOW - 16 * MINUTE}, "PitrArchiveNotAdvancing"),
        ({"last_archived": None, "last_archived_at": None}, "PitrArchiveNotAdvancing"),
        ({"gaps": (WalGap("000000010000000200000070", "000000010000000200000070", 1),)}, "PitrWalGap"),
    ],
)
def test_each_silent_failure_of_archiving_is_told(changes: dict[str, object], alert: str) -> None:
    assert alerts(with_wal(**changes)) == [alert]


@pytest.mark.parametrize(
    "changes",
    [
        {"last_archived_at": NOW - DAY, "written_bytes_per_second": 0.0},  # an idle database
        {"last_archived_at": NOW - DAY, "is_primary": False},  # a standby
        {"seconds_until_full": 7300.0},
        {"backlog_files": 3, "backlog_oldest_seconds": 299.0},
        {"failure": Failure(NOW, "once, and it is tried again")},
    ],
)
def test_what_only_looks_like_a_failure_is_not_told(changes: dict[str, object]) -> None:
    assert alerts(with_wal(**changes)) == []


def test_the_reason_of_a_backlog_is_told_once() -> None:
    failing = with_wal(backlog_files=1, backlog_oldest_seconds=400.0, failure=Failure(NOW, "the disk is full"))
    assert "the disk is full" in find(failing)[0].text
    away = replace(failing, store=StoreStatus(NOW - HOUR, NOW - HOUR, "no route", None, None))
    assert [("the disk is full" in each.text) for each in find(away)] == [False, False]


@pytest.mark.parametrize(
    ("store", "alert"),
    [
        (StoreStatus(NOW - 5 * MINUTE, NOW - 3 * MINUTE, "timeout", None, None), "PitrStoreUnreachable"),
        (StoreStatus(NOW, None, "", NOW + 9 * MINUTE, None), "PitrCredentialsExpire"),
        (StoreStatus(NOW, None, "", NOW - MINUTE, None), "PitrCredentialsExpire"),
        (StoreStatus(NOW, None, "", None, "the repository belongs to 1, this server is 2"), "PitrForeignCluster"),
    ],
)
def test_a_store_that_cannot_be_used_is_told(store: StoreStatus, alert: str) -> None:
    assert alerts(replace(healthy(), store=store)) == [alert]


def test_one_request_that_failed_is_not_an_outage() -> None:
    assert alerts(replace(healthy(), store=StoreStatus(NOW, NOW - MINUTE, "timeout", None, None))) == []


def test_base_backups_that_are_too_old_or_fail_or_stand_still_are_told() -> None:
    status = healthy()
    old = replace(status.backups, newest=(replace(week()[0], finish_time=NOW - 27 * HOUR),))
    failing = replace(status.backups, last_failure=FailedBackup(NOW - HOUR, "no space", 1))
    failed_before = replace(status.backups, last_failure=FailedBackup(NOW - 9 * HOUR, "no space", 1))
    work = running().backups.running
    assert work is not None
    stalled = replace(status.backups, running=replace(work, idle_seconds=1801.0))
    assert alerts(replace(status, backups=old)) == ["PitrNoBaseBackup"]
    assert alerts(replace(status, backups=failing)) == ["PitrBackupFailing"]
    assert alerts(replace(status, backups=failed_before)) == []
    assert alerts(replace(status, backups=stalled)) == ["PitrBackupStalled"]


def test_corrupt_pages_of_the_newest_base_backup_are_told() -> None:
    status, (newest, *older) = healthy(), week()
    corrupt = replace(status.backups, newest=(replace(newest, corrupt_pages=3),))
    repaired = replace(status.backups, newest=(newest, *(replace(each, corrupt_pages=3) for each in older)))
    assert alerts(replace(status, backups=corrupt)) == ["PitrBackupCorruptPages"]
    assert alerts(replace(status, backups=repaired)) == []


def test_a_window_that_is_shorter_than_promised_is_told_but_not_a_young_one() -> None:
    status, catalog = healthy(), week()
    later = RangeStatus(catalog[2].name, catalog[2].finish_time, "0/1", NOW, "0/2")
    short = replace(status, window=window(TimelineStatus(1, None, (later,), ())))
    assert alerts(short) == ["PitrWindowShort"]
    young = replace(short, backups=replace(status.backups, catalog=catalog[:3]))
    assert alerts(young) == []


def test_base_backups_without_their_wal_are_told_once_the_window_was_looked_at() -> None:
    status, nothing = healthy(), window()
    assert alerts(replace(status, window=nothing)) == ["PitrWindowShort"]
    assert alerts(replace(status, window=replace(nothing, looked_at=NOW - DAY))) == []


def test_a_repository_that_is_not_whole_or_was_not_looked_at_is_told() -> None:
    status = healthy()
    damaged = VerificationStatus(NOW, (), 2, ("base_1: part_001 is missing", "base_2: part_001 is missing"), None)
    old = VerificationStatus(NOW - 3 * DAY, (), 0, (), Failure(NOW, "access denied"))
    assert alerts(replace(status, verification=damaged)) == ["PitrRepositoryDamaged"]
    assert alerts(replace(status, verification=old)) == ["PitrVerificationStale"]
    assert "access denied" in find(replace(status, verification=old))[0].text


def test_memory_and_expiry_are_warnings_and_come_after_what_is_critical() -> None:
    status = replace(healthy(), memory=MemoryStatus(100, 96))
    assert [each.severity for each in find(status)] == ["warning"]
    assert alerts(broken())[-2:] == ["PitrExpiryFailing", "PitrMemoryNearBudget"]
    assert [each.severity for each in find(broken())] == sorted(each.severity for each in find(broken()))


def test_every_finding_says_what_to_do() -> None:
    assert all(each.what_to_do and each.text for each in find(broken()))


@pytest.mark.parametrize(
    ("succeeded_at", "failed_at", "told"),
    [
        (None, None, []),
        (NOW - 9 * DAY + MINUTE, None, []),
        (NOW - 9 * DAY, None, ["PitrDrillStale"]),
        (NOW - DAY, NOW - 2 * DAY, []),
        (NOW - 10 * DAY, NOW - DAY, ["PitrDrillFailed"]),
        (None, NOW - DAY, ["PitrDrillFailed"]),
    ],
)
def test_a_drill_that_failed_or_was_long_ago_is_told(
    succeeded_at: datetime | None, failed_at: datetime | None, told: list[str]
) -> None:
    succeeded = None if succeeded_at is None else Drill("base", succeeded_at, NOW - 20 * DAY, 60.0)
    failed = None if failed_at is None else FailedDrill("base", failed_at, 52)
    status = replace(healthy(), drills=drills(DrilledBackup("base", succeeded, failed)))
    assert alerts(status) == told
    critical = ["exit code 52" in each.text for each in find(status) if each.severity == "critical"]
    assert critical == [True] * told.count("PitrDrillFailed")
