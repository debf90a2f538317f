"""The status: its JSON form, and the metrics that say the same."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from prometheus_client import CollectorRegistry

from agent.telemetry.findings import find
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import (
    AgentStatus,
    BackupsStatus,
    CompleteBackup,
    FailedBackup,
    Failure,
    NextBackup,
    ReadBackup,
    ReadingStatus,
    RunningBackup,
    RunningReading,
    VerificationStatus,
    WalGap,
    WalStatus,
    as_json,
)
from agent.telemetry.status_metrics import publish
from tests.support.statuses import broken, empty, healthy, hostile, running, starting

NOW = datetime(2026, 11, 23, 2, 3, 4, tzinfo=UTC)
RUNNING = RunningBackup("auto", "scheduled", False, NOW, 64.0, "copying files", 50, 200, 0.25, 10.0, 15.0)
NEWEST = CompleteBackup("base_000000010000000000000004", "full", NOW - timedelta(days=1), NOW, 37, 8, corrupt_pages=3)


def status(running: RunningBackup | None) -> AgentStatus:
    gap = WalGap("000000010000000000000002", "000000010000000000000003", 2)
    wal = WalStatus("000000010000000000000009", None, 3, 48, 1.5, (gap,))
    backups = BackupsStatus(
        "0 2 * * *", "primary", 1, NOW, (NEWEST,), running, FailedBackup(NOW, "the store is away", 2),
        NextBackup(NOW + timedelta(days=1), "scheduled"), None,
    )  # fmt: skip
    return AgentStatus("archive", "0.1.0", NOW, NOW, wal, backups)


def test_the_metrics_tell_of_drills_and_zero_while_none_is_known() -> None:
    metrics = Metrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    publish(status(None), metrics)
    assert value("pitr_drill_last_success_timestamp_seconds") == value("pitr_drill_last_failure_timestamp_seconds") == 0
    told = healthy().drills
    assert told is not None
    assert told.succeeded is not None
    assert told.failed is not None
    publish(healthy(), metrics)
    assert value("pitr_drill_last_success_timestamp_seconds") == told.succeeded.at.timestamp()
    assert value("pitr_drill_last_failure_timestamp_seconds") == told.failed.at.timestamp()
    assert value("pitr_drill_moment_timestamp_seconds") == told.succeeded.moment.timestamp()
    assert value("pitr_drill_duration_seconds") == told.succeeded.seconds


def test_the_json_form_has_the_fields_by_name_and_times_in_utc() -> None:
    values = json.loads(json.dumps(as_json(status(RUNNING))))
    assert values["now"] == "2026-11-23T02:03:04.000000Z"
    assert values["wal"]["gaps"] == [
        {"first_missing": "000000010000000000000002", "last_missing": "000000010000000000000003", "segments": 2}
    ]
    assert values["backups"]["newest"][0]["finish_time"] == "2026-11-23T02:03:04.000000Z"
    assert values["backups"]["running"] == as_json(RUNNING)
    assert (values["backups"]["running"]["ratio"], values["backups"]["running"]["seconds_left"]) == (0.25, 15.0)


def test_the_metrics_say_what_the_status_says() -> None:
    metrics = Metrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    publish(status(RUNNING), metrics)
    assert value("pitr_backup_corrupt_pages") == 3
    assert value("postgres_base_backup_last_success_timestamp") == NOW.timestamp()
    assert value("pitr_backup_last_success_timestamp_seconds", {"kind": "full"}) == NOW.timestamp()
    assert value("pitr_backup_next_timestamp_seconds") == NOW.timestamp() + 86400
    assert value("pitr_backup_last_failure_timestamp_seconds") == NOW.timestamp()
    assert value("pitr_backup_progress_ratio") == 0.25
    assert value("pitr_backup_stage", {"stage": "copying files"}) == 1
    publish(status(None), metrics)
    assert value("pitr_backup_in_progress") == value("pitr_backup_done_bytes") == 0
    assert value("pitr_backup_stage", {"stage": "copying files"}) is None


def test_the_metrics_of_reading_back_say_what_the_status_says() -> None:
    metrics = Metrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    backups = (ReadBackup("one", NOW, ()), ReadBackup("two", None, ("torn",)))
    reading = ReadingStatus(
        "0 5 * * *", 1 << 30, RunningReading(1, 4, 0.25), NOW, None, None, 1, ("two: torn",), backups
    )
    whole = VerificationStatus(NOW, ("one", "two"), 0, (), None)
    damaged = replace(status(None), reading=reading, verification=whole)
    publish(damaged, metrics)
    assert value("pitr_verify_problems") == value("pitr_verify_in_progress") == 1
    assert (value("pitr_verify_progress_ratio"), value("pitr_verify_oldest_timestamp_seconds")) == (0.25, 0)
    assert "PitrRepositoryDamaged" in {finding.alert for finding in find(damaged)}
    failed = replace(reading, running=None, backups=backups[:1], problems=0, failure=Failure(NOW, "store away"))
    publish(replace(status(None), reading=failed, verification=whole), metrics)
    assert (value("pitr_verify_failing"), value("pitr_verify_in_progress")) == (1, 0)
    assert value("pitr_verify_oldest_timestamp_seconds") == NOW.timestamp()
    assert value("pitr_verify_last_success_timestamp_seconds") == NOW.timestamp()


def test_the_metrics_of_a_broken_agent_say_what_is_broken() -> None:
    metrics = Metrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    publish(broken(), metrics)
    assert value("pitr_repository_failing_seconds") == 39 * 60
    assert value("pitr_repository_credentials_expiry_timestamp_seconds") == 0
    assert value("pitr_expire_failing") == 1
    assert value("pitr_retention_window_seconds") == 7 * 86400
    assert value("pitr_verify_problems") == 2
    assert value("pitr_verify_last_success_timestamp_seconds") == 0
    assert value("pitr_memory_budget_bytes") == 256 << 20
    publish(healthy(), metrics)
    assert (
        value("pitr_repository_failing_seconds") == value("pitr_expire_failing") == value("pitr_verify_problems") == 0
    )
    store, verification = healthy().store, healthy().verification
    assert store is not None
    assert store.credentials_expire_at is not None
    assert verification is not None
    assert verification.at is not None
    expiry = store.credentials_expire_at.timestamp()
    assert value("pitr_repository_credentials_expiry_timestamp_seconds") == expiry
    assert value("pitr_verify_last_success_timestamp_seconds") == verification.at.timestamp()
    assert value("pitr_findings", {"severity": "critical"}) == 0
    oldest = healthy().backups.catalog[-1].finish_time
    assert value("pitr_backup_oldest_timestamp_seconds") == oldest.timestamp()


def test_every_status_has_a_json_form() -> None:
    for each in (healthy, running, broken, empty, starting, hostile):
        values = json.loads(json.dumps(as_json(each())))
        assert [finding["alert"] for finding in values["findings"]] == [f.alert for f in each().findings]
