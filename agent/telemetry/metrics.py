"""Every metric of the agent, declared once. No label takes values without bound."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics, registered with `registry`; attribute names are their purpose."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.agent_info = Gauge(
            "pitr_agent_info",
            "1; the labels say which version runs, in which mode",
            ["version", "mode"],
            registry=registry,
        )
        self.findings = Gauge(
            "pitr_findings",
            "What the status page tells of as wrong",
            ["severity"],
            registry=registry,
        )
        self.is_primary = Gauge(
            "pitr_postgres_is_primary",
            "1 if the data directory is that of a primary",
            registry=registry,
        )
        self.archived_files = Counter(
            "pitr_archived_files",
            "WAL files stored, or found stored with the same content",
            ["kind"],
            registry=registry,
        )
        self.archived_bytes = Counter(
            "pitr_archived_bytes", "Bytes of WAL files archived, before compression", registry=registry
        )
        self.archived_stored_bytes = Counter(
            "pitr_archived_stored_bytes", "Bytes of WAL files archived, as stored", registry=registry
        )
        self.archive_seconds = Histogram(
            "pitr_archive_seconds", "Time to make one WAL file durable", buckets=_SECONDS, registry=registry
        )
        self.archive_failures = Counter(
            "pitr_archive_failures", "Attempts to archive a WAL file that failed", ["reason"], registry=registry
        )
        self.archive_last_success = Gauge(
            "pitr_archive_last_success_timestamp_seconds", "When a WAL file was last archived", registry=registry
        )
        self.archive_last_failure = Gauge(
            "pitr_archive_last_failure_timestamp_seconds", "When archiving a WAL file last failed", registry=registry
        )
        self.archive_backlog_files = Gauge(
            "pitr_archive_backlog_files",
            "WAL files that PostgreSQL marked ready and are not archived",
            registry=registry,
        )
        self.archive_backlog_age = Gauge(
            "pitr_archive_backlog_age_seconds",
            "Age of the oldest WAL file in the backlog, 0 if none",
            registry=registry,
        )
        self.archive_backlog_bytes = Gauge(
            "pitr_archive_backlog_bytes", "Size of the WAL files in the backlog", registry=registry
        )
        self.wal_written_rate = Gauge(
            "pitr_wal_written_bytes_per_second", "Speed at which PostgreSQL fills WAL segments", registry=registry
        )
        self.wal_archived_rate = Gauge(
            "pitr_wal_archived_bytes_per_second",
            "Speed at which WAL is archived, before compression",
            registry=registry,
        )
        self.wal_volume_free_bytes = Gauge(
            "pitr_wal_volume_free_bytes", "Free space on the volume of pg_wal", registry=registry
        )
        self.wal_volume_full_seconds = Gauge(
            "pitr_wal_volume_seconds_until_full",
            "When the volume of pg_wal is full if its backlog goes on growing like this, +Inf if it does not grow",
            registry=registry,
        )
        self.wal_volume_full_seconds.set(float("inf"))
        self.wal_gaps = Gauge(
            "pitr_wal_gaps", "Gaps in the archived WAL on the way to the server's timeline", registry=registry
        )
        self.wal_gap_segments = Gauge("pitr_wal_gap_segments", "WAL segments missing in these gaps", registry=registry)
        self.wal_continuity_last_check = Gauge(
            "pitr_wal_continuity_last_check_timestamp_seconds",
            "When the repository was last compared with the server's WAL",
            registry=registry,
        )
        self.window_from = Gauge(
            "pitr_window_from_timestamp_seconds",
            "Earliest moment of the unbroken range that an ordinary restore can choose from, 0 if there is none",
            registry=registry,
        )
        self.window_to = Gauge(
            "pitr_window_to_timestamp_seconds",
            "Last archived transaction of the range that an ordinary restore can choose from, 0 if there is none",
            registry=registry,
        )
        self.window_gaps = Gauge(
            "pitr_window_gaps",
            "Gaps in the archived WAL of any timeline, after the oldest base backup",
            registry=registry,
        )
        self.fetched_files = Counter(
            "pitr_fetched_files", "Requests for WAL files by recovery", ["result"], registry=registry
        )
        self.fetched_bytes = Counter("pitr_fetched_bytes", "Bytes of WAL handed to recovery", registry=registry)
        self.fetch_awaited = Gauge(
            "pitr_fetch_awaited_since_timestamp_seconds",
            "Since when recovery has been asking for a WAL file without an answer; 0: it has one",
            registry=registry,
        )
        self.fetch_seconds = Histogram(
            "pitr_fetch_seconds", "Time to answer a request of recovery", buckets=_SECONDS, registry=registry
        )
        self.backup_last_success = Gauge(
            "postgres_base_backup_last_success_timestamp",
            "When the newest base backup of this repository finished",
            registry=registry,
        )
        self.backup_in_progress = Gauge("pitr_backup_in_progress", "1 while a base backup runs", registry=registry)
        self.backup_progress = Gauge(
            "pitr_backup_progress_ratio", "Share of the running base backup that is done", registry=registry
        )
        self.backup_done_bytes = Gauge(
            "pitr_backup_done_bytes", "Bytes done in the current stage of the running base backup", registry=registry
        )
        self.backup_total_bytes = Gauge(
            "pitr_backup_total_bytes", "Bytes to do in the current stage of the running base backup", registry=registry
        )
        self.backup_running_seconds = Gauge(
            "pitr_backup_running_seconds", "How long the running base backup has been running", registry=registry
        )
        self.backup_stage = Gauge(
            "pitr_backup_stage", "1 for the stage that the running base backup is in", ["stage"], registry=registry
        )
        self.backups_complete = Gauge(
            "pitr_backups_complete", "Base backups in the repository when it was last looked at", registry=registry
        )
        self.backup_last_success_of_kind = Gauge(
            "pitr_backup_last_success_timestamp_seconds",
            "When the newest base backup of this kind finished",
            ["kind"],
            registry=registry,
        )
        self.backup_last_failure = Gauge(
            "pitr_backup_last_failure_timestamp_seconds",
            "When a base backup of this agent last failed",
            registry=registry,
        )
        self.backup_next = Gauge(
            "pitr_backup_next_timestamp_seconds",
            "When this agent takes the next base backup by itself, 0 if it does not",
            registry=registry,
        )
        self.backup_idle_seconds = Gauge(
            "pitr_backup_idle_seconds",
            "For how long the running base backup has not come any further, 0 if none runs",
            registry=registry,
        )
        self.backup_oldest = Gauge(
            "pitr_backup_oldest_timestamp_seconds",
            "When the oldest base backup of this repository finished, 0 if there is none",
            registry=registry,
        )
        self.backups = Counter("pitr_backups", "Base backups ended", ["kind", "result"], registry=registry)
        self.backup_seconds = Gauge("pitr_backup_seconds", "Duration of the last base backup", registry=registry)
        self.backup_bytes = Gauge(
            "pitr_backup_bytes", "Size of the last base backup before compression", registry=registry
        )
        self.backup_read_bytes = Gauge(
            "pitr_backup_read_bytes", "What the last base backup read of the data directory", registry=registry
        )
        self.backup_stored_bytes = Gauge(
            "pitr_backup_stored_bytes", "Size of the last base backup as stored", registry=registry
        )
        self.backup_corrupt_pages = Gauge(
            "pitr_backup_corrupt_pages", "Pages with a wrong checksum in the newest base backup", registry=registry
        )
        self.verify_last_check = Gauge(
            "pitr_verify_last_check_timestamp_seconds",
            "When every object of the repository was last looked for",
            registry=registry,
        )
        self.verify_last_success = Gauge(
            "pitr_verify_last_success_timestamp_seconds",
            "When all that the base backups need was last found in the repository",
            registry=registry,
        )
        self.verify_last_round = Gauge(
            "pitr_verify_last_round_timestamp_seconds", "When a round of reading back last ended", registry=registry
        )
        self.verify_oldest = Gauge(
            "pitr_verify_oldest_timestamp_seconds",
            "When the base backup that was read back longest ago was, 0 if one never was",
            registry=registry,
        )
        self.verify_failing = Gauge(
            "pitr_verify_failing", "1 while the last round of reading back could not be done", registry=registry
        )
        self.verify_failures = Counter(
            "pitr_verify_failures", "Rounds of reading back that could not be done", registry=registry
        )
        self.verify_in_progress = Gauge(
            "pitr_verify_in_progress", "1 while the repository is read back", registry=registry
        )
        self.verify_progress = Gauge(
            "pitr_verify_progress_ratio", "Share of what the running round has to read that is read", registry=registry
        )
        self.verify_objects = Counter("pitr_verify_objects", "Objects read back by verification", registry=registry)
        self.verify_bytes = Counter(
            "pitr_verify_bytes", "Bytes read back by verification, as stored", registry=registry
        )
        self.verify_problems = Gauge(
            "pitr_verify_problems", "What was then missing or damaged in the repository", registry=registry
        )
        self.drill_last_success = Gauge(
            "pitr_drill_last_success_timestamp_seconds",
            "When a restore drill of this repository last succeeded, 0 if none is known",
            registry=registry,
        )
        self.drill_last_failure = Gauge(
            "pitr_drill_last_failure_timestamp_seconds",
            "When a restore drill of this repository last failed, 0 if none is known",
            registry=registry,
        )
        self.drill_moment = Gauge(
            "pitr_drill_moment_timestamp_seconds",
            "The moment that the last successful drill restored, 0 if none is known",
            registry=registry,
        )
        self.drill_seconds = Gauge(
            "pitr_drill_duration_seconds",
            "How long the last successful drill took to restore: the recovery time to expect",
            registry=registry,
        )
        self.expire_last_success = Gauge(
            "pitr_expire_last_success_timestamp_seconds", "When an expiry last removed all it had to", registry=registry
        )
        self.expire_failures = Counter(
            "pitr_expire_failures", "Expiries that failed, or could not remove everything", registry=registry
        )
        self.expire_failing = Gauge(
            "pitr_expire_failing",
            "1 if the last expiry of this agent failed, or could not remove everything",
            registry=registry,
        )
        self.retention_window = Gauge(
            "pitr_retention_window_seconds",
            "How far back PITR_RETENTION promises that all can be restored, 0: names no window",
            registry=registry,
        )
        self.expire_objects = Counter(
            "pitr_expire_removed_objects", "Objects removed by expiries", ["kind"], registry=registry
        )
        self.expire_bytes = Counter(
            "pitr_expire_removed_bytes", "Bytes removed by expiries, as stored", ["kind"], registry=registry
        )
        self.expire_window_begin = Gauge(
            "pitr_expire_window_begin_timestamp_seconds",
            "From when on everything can be restored, as of the last expiry",
            registry=registry,
        )
        self.restore_stage = Gauge(
            "pitr_restore_stage", "1 for the stage that the restore is in", ["stage"], registry=registry
        )
        self.restore_progress = Gauge(
            "pitr_restore_progress_ratio", "Share of the restore's current stage that is done", registry=registry
        )
        self.restore_replayed_lsn = Gauge(
            "pitr_restore_replayed_lsn",
            "Position up to which WAL was handed to the replaying server",
            registry=registry,
        )
        self.restore_target_lsn = Gauge(
            "pitr_restore_target_lsn", "End of the last WAL segment that the restore's plan names", registry=registry
        )
        self.repository_requests = Counter(
            "pitr_repository_requests", "Requests to the repository", ["operation", "result"], registry=registry
        )
        self.repository_failed_attempts = Counter(
            "pitr_repository_failed_attempts",
            "Attempts that the store did not answer, or with a passing fault",
            registry=registry,
        )
        self.repository_seconds = Histogram(
            "pitr_repository_seconds",
            "Duration of repository requests",
            ["operation"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.repository_bytes = Counter(
            "pitr_repository_bytes", "Bytes sent to and received from the repository", ["direction"], registry=registry
        )
        self.memory_budget_used = Gauge(
            "pitr_memory_budget_used_bytes", "Bytes of the memory budget in use", registry=registry
        )
        self.memory_budget = Gauge(
            "pitr_memory_budget_bytes",
            "The memory budget",
            registry=registry,
        )
        self.store_last_answer = Gauge(
            "pitr_repository_last_answer_timestamp_seconds",
            "When the store last answered a request",
            registry=registry,
        )
        self.store_failing_seconds = Gauge(
            "pitr_repository_failing_seconds",
            "For how long the store has answered no request, or refused them",
            registry=registry,
        )
        self.credentials_expiry = Gauge(
            "pitr_repository_credentials_expiry_timestamp_seconds",
            "When the credentials for the store expire, 0: never, as far as is known",
            registry=registry,
        )
        self.foreign = Gauge(
            "pitr_repository_foreign",
            "1 if nothing is stored because the repository is another database cluster's",
            registry=registry,
        )
        # From the start, at 0: Prometheus sees no increase in a counter that begins at 1.
        for counter, *values in (
            (self.archived_files, "segment", "partial", "history", "backup_history"),
            (self.archive_failures, "conflict", "refused", "unavailable", "repository", "internal"),
            (self.fetched_files, "served", "absent", "failed"),
            (self.expire_objects, "backup", "wal"),
            (self.expire_bytes, "backup", "wal"),
        ):
            for value in values:
                counter.labels(value)
        for kind in ("full", "delta"):
            for result in ("ok", "failed"):
                self.backups.labels(kind, result)
