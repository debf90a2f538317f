"""What `/metrics` shows of the status."""

from datetime import datetime

from agent.telemetry.metrics import Metrics
from agent.telemetry.status import (
    AgentStatus,
    BackupsStatus,
    DrillsStatus,
    ExpiryStatus,
    ReadingStatus,
    RunningBackup,
    StoreStatus,
    WindowStatus,
)

SEVERITIES = ("critical", "warning")


def publish(status: AgentStatus, metrics: Metrics) -> None:
    """Set the gauges that say what `status` says. What is not known keeps its last value."""
    _publish_backups(status.backups, metrics)
    _publish_running(status.backups.running, metrics)
    if status.window is not None:
        _publish_window(status.window, metrics)
    metrics.is_primary.set(1 if status.wal.is_primary else 0)
    for severity in SEVERITIES:
        metrics.findings.labels(severity).set(sum(each.severity == severity for each in status.findings))
    if status.store is not None:
        _publish_store(status.store, status.now, metrics)
    if status.expiry is not None:
        _publish_expiry(status.expiry, metrics)
    if status.verification is not None and status.verification.at is not None:
        read = 0 if status.reading is None else status.reading.problems
        metrics.verify_problems.set(status.verification.problems + read)
        metrics.verify_last_check.set(status.verification.at.timestamp())
        if not status.verification.problems + read:
            metrics.verify_last_success.set(status.verification.at.timestamp())
    if status.reading is not None:
        _publish_reading(status.reading, metrics)
    if status.drills is not None:
        _publish_drills(status.drills, metrics)
    if status.memory is not None:
        metrics.memory_budget.set(status.memory.limit_bytes)


def _publish_store(store: StoreStatus, now: datetime, metrics: Metrics) -> None:
    if store.answered_at is not None:
        metrics.store_last_answer.set(store.answered_at.timestamp())
    failing = 0.0 if store.failing_since is None else (now - store.failing_since).total_seconds()
    metrics.store_failing_seconds.set(failing)
    expiry = store.credentials_expire_at
    metrics.credentials_expiry.set(0 if expiry is None else expiry.timestamp())
    metrics.foreign.set(0 if store.foreign is None else 1)


def _publish_expiry(expiry: ExpiryStatus, metrics: Metrics) -> None:
    metrics.expire_failing.set(0 if expiry.failure is None else 1)
    metrics.retention_window.set(expiry.window_seconds or 0)


def _publish_reading(reading: ReadingStatus, metrics: Metrics) -> None:
    running = reading.running
    metrics.verify_in_progress.set(0 if running is None else 1)
    metrics.verify_progress.set(0 if running is None else running.ratio)
    metrics.verify_failing.set(0 if reading.failure is None else 1)
    if reading.ended_at is not None:
        metrics.verify_last_round.set(reading.ended_at.timestamp())
    times = [0.0 if each.verified_at is None else each.verified_at.timestamp() for each in reading.backups]
    if times:
        metrics.verify_oldest.set(min(times))


def _publish_drills(drills: DrillsStatus, metrics: Metrics) -> None:
    if drills.succeeded is not None:
        metrics.drill_last_success.set(drills.succeeded.at.timestamp())
        metrics.drill_moment.set(drills.succeeded.moment.timestamp())
        metrics.drill_seconds.set(drills.succeeded.seconds)
    if drills.failed is not None:
        metrics.drill_last_failure.set(drills.failed.at.timestamp())


def _publish_window(window: WindowStatus, metrics: Metrics) -> None:
    metrics.window_from.set(0 if window.from_time is None else window.from_time.timestamp())
    metrics.window_to.set(0 if window.to_time is None else window.to_time.timestamp())
    metrics.window_gaps.set(window.gaps)


def _publish_backups(backups: BackupsStatus, metrics: Metrics) -> None:
    if backups.complete is not None:
        metrics.backups_complete.set(backups.complete)
        oldest = min((backup.finish_time.timestamp() for backup in backups.catalog), default=0.0)
        metrics.backup_oldest.set(oldest)
    if backups.newest:
        metrics.backup_last_success.set(backups.newest[0].finish_time.timestamp())
        metrics.backup_corrupt_pages.set(backups.newest[0].corrupt_pages)
    for newest in backups.newest:
        metrics.backup_last_success_of_kind.labels(newest.kind).set(newest.finish_time.timestamp())
    if backups.last_failure is not None:
        metrics.backup_last_failure.set(backups.last_failure.at.timestamp())
    metrics.backup_next.set(backups.next.at.timestamp() if backups.next is not None else 0)


def _publish_running(running: RunningBackup | None, metrics: Metrics) -> None:
    metrics.backup_in_progress.set(0 if running is None else 1)
    metrics.backup_progress.set(0 if running is None else running.ratio)
    metrics.backup_done_bytes.set(0 if running is None else running.done_bytes)
    metrics.backup_total_bytes.set(0 if running is None else running.total_bytes)
    metrics.backup_running_seconds.set(0 if running is None else running.seconds)
    metrics.backup_idle_seconds.set(0 if running is None else running.idle_seconds)
    metrics.backup_stage.clear()
    if running is not None:
        metrics.backup_stage.labels(running.stage).set(1)
