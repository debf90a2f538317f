"""What is wrong, and what to do: rules over the status, each with its section in docs/alerts.md.

The alerts in k8s/monitoring/ ask the metrics, which say the same, for the same limits; they also see what no agent can
tell of itself.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from agent.telemetry.status import AgentStatus, Finding, WindowStatus
from agent.telemetry.words import age_text, seconds_text, time_text

RPO_SECONDS = 300.0  # a WAL file that waits longer is more loss than promised
SILENT_SECONDS = 900.0  # WAL is written, and none archived
UNREACHABLE_SECONDS = 120.0  # longer than a store's hiccup and the client's own patience
VOLUME_FULL_SECONDS = 2 * 3600.0
BACKUP_AGE = timedelta(hours=26)  # a day, and what a base backup takes
BACKUP_IDLE_SECONDS = 1800.0
VERIFICATION_AGE = timedelta(days=2)
DRILL_AGE = timedelta(days=9)  # they are weekly
CREDENTIALS_LEFT = timedelta(minutes=10)  # what can be renewed was renewed five minutes before that
MEMORY_SHARE = 0.95
WINDOW_TOLERANCE = timedelta(hours=1)

_Rule = Callable[[AgentStatus], Finding | None]


def find(status: AgentStatus) -> tuple[Finding, ...]:
    """Return what is wrong, the worst first."""
    found = [finding for rule in _RULES if (finding := rule(status)) is not None]
    return tuple(sorted(found, key=lambda finding: finding.severity != "critical"))


def _critical(alert: str, text: str, what_to_do: str) -> Finding:
    return Finding(alert, "critical", text, what_to_do)


def _warning(alert: str, text: str, what_to_do: str) -> Finding:
    return Finding(alert, "warning", text, what_to_do)


def _foreign(status: AgentStatus) -> Finding | None:
    if status.store is None or status.store.foreign is None:
        return None
    return _critical(
        "PitrForeignCluster",
        f"Nothing is archived: {status.store.foreign}.",
        "Give this server a WALG_S3_PREFIX of its own, as after a new initdb or pg_upgrade, then restart the agent.",
    )


def _store(status: AgentStatus) -> Finding | None:
    store = status.store
    if store is None or store.failing_since is None or _age(store.failing_since, status) < UNREACHABLE_SECONDS:
        return None
    return _critical(
        "PitrStoreUnreachable",
        f"The store has not answered for {seconds_text(_age(store.failing_since, status))}: {store.reason}",
        "Look at the store, the network policy and the credentials. PostgreSQL keeps its WAL until this is over.",
    )


def _credentials(status: AgentStatus) -> Finding | None:
    expiry = status.store.credentials_expire_at if status.store is not None else None
    if expiry is None or expiry - status.now > CREDENTIALS_LEFT:
        return None
    verb = "expire" if expiry > status.now else "have expired"
    return _critical(
        "PitrCredentialsExpire",
        f"The credentials for the store {verb}, {age_text(expiry, status.now)}, and were not renewed.",
        "Replace the session token, or see why the workload identity's token is not renewed.",
    )


def _volume(status: AgentStatus) -> Finding | None:
    until_full = status.wal.seconds_until_full
    if until_full is None or until_full >= VOLUME_FULL_SECONDS:
        return None
    return _critical(
        "PitrWalVolumeFillsUp",
        f"The volume of pg_wal is full in {seconds_text(until_full)}; then PostgreSQL stops.",
        "See why WAL is not archived, below; else make the volume larger. Never remove files from pg_wal.",
    )


def _silent(status: AgentStatus) -> Finding | None:
    wal = status.wal
    since = wal.last_archived_at or status.started_at
    if not wal.is_primary or not wal.written_bytes_per_second or _age(since, status) < SILENT_SECONDS:
        return None
    if wal.backlog_oldest_seconds >= RPO_SECONDS:
        return None  # said there
    last = "since the agent started" if wal.last_archived_at is None else f"since {time_text(wal.last_archived_at)}"
    return _critical(
        "PitrArchiveNotAdvancing",
        f"PostgreSQL writes WAL, and none was archived {last}.{_reason(status)}",
        "Compare archive_mode, archive_command and archive_timeout with the documentation; read PostgreSQL's log.",
    )


def _backlog(status: AgentStatus) -> Finding | None:
    wal = status.wal
    if wal.backlog_oldest_seconds < RPO_SECONDS:
        return None
    return _critical(
        "PitrArchiveBacklogOld",
        f"{wal.backlog_files} WAL files are not archived, the oldest for {seconds_text(wal.backlog_oldest_seconds)}."
        f"{_reason(status)}",
        "If the server were lost now, so would be what was committed since. Remove the cause; the agent catches up.",
    )


def _gap(status: AgentStatus) -> Finding | None:
    gaps = status.wal.gaps
    if not gaps:
        return None
    segments = sum(gap.segments for gap in gaps)
    return _critical(
        "PitrWalGap",
        f"{segments} WAL segments are missing in the repository, from {gaps[0].first_missing} to "
        f"{gaps[-1].last_missing}: no moment in or after a gap can be reached from a base backup before it.",
        "The agent takes a base backup that begins after the gap. If another server's pg_wal has them, archive them.",
    )


def _no_backup(status: AgentStatus) -> Finding | None:
    backups = status.backups
    if backups.complete is None or backups.running is not None:
        return None
    failure = backups.last_failure
    newest = backups.newest[0].finish_time if backups.newest else None
    failed = failure is not None and (newest is None or failure.at > newest)
    told = (
        f" The last attempt failed at {time_text(failure.at)}: {failure.reason}"
        if failure is not None and failed
        else ""
    )
    if newest is None:
        return _critical(
            "PitrNoBaseBackup", f"There is no base backup: nothing can be restored.{told}", "pitr backup now"
        )
    if status.now - newest >= BACKUP_AGE:
        return _critical(
            "PitrNoBaseBackup",
            f"The newest base backup finished at {time_text(newest)}, {seconds_text(_age(newest, status))} ago.{told}",
            "Restores get slower with every hour of WAL. See why none is taken, then: pitr backup now",
        )
    if not told:
        return None
    return _warning("PitrBackupFailing", told.strip(), "It is tried again by itself. Or now: pitr backup now")


def _corrupt_pages(status: AgentStatus) -> Finding | None:
    newest = status.backups.newest[0] if status.backups.newest else None
    if newest is None or not newest.corrupt_pages:
        return None
    return _critical(
        "PitrBackupCorruptPages",
        f"The database has damaged pages: {newest.corrupt_pages} in the newest base backup had a wrong checksum.",
        "See the agent's log for file and block. The newest base backup without such pages, and all WAL since, stay.",
    )


def _stalled(status: AgentStatus) -> Finding | None:
    running = status.backups.running
    if running is None or running.idle_seconds < BACKUP_IDLE_SECONDS:
        return None
    return _warning(
        "PitrBackupStalled",
        f"The running base backup has not come any further for {seconds_text(running.idle_seconds)} ({running.stage}).",
        "Look at the store and at the volume's speed. To begin anew: pitr backup cancel, then pitr backup now",
    )


def _window(status: AgentStatus) -> Finding | None:
    window, promised = status.window, status.expiry.window_seconds if status.expiry is not None else None
    if window is None or not status.backups.catalog:
        return None
    if window.from_time is None:
        return _useless(window, status.backups.catalog[0].finish_time)
    if not promised:
        return None
    oldest = min(backup.finish_time for backup in status.backups.catalog)
    owed = max(status.now - timedelta(seconds=promised), oldest)
    if window.from_time - owed < WINDOW_TOLERANCE:
        return None
    return _critical(
        "PitrWindowShort",
        f"PITR_RETENTION promises every moment since {time_text(owed)}, but only those since "
        f"{time_text(window.from_time)} can be restored without a break.",
        "What is lost stays lost: pin the base backups before it that matter, and see what removed WAL or backups.",
    )


def _useless(window: WindowStatus, newest: datetime) -> Finding | None:
    if window.looked_at is None or window.looked_at < newest:
        return None  # looked at before there was one
    return _critical(
        "PitrWindowShort",
        "Nothing can be restored: there are base backups, and none has the WAL that it needs.",
        "pitr backup now; then see with pitr verify what is missing, and what removed it.",
    )


def _verification(status: AgentStatus) -> Finding | None:
    found = status.verification
    if found is None:
        return None
    if found.problems:
        more = f" And {found.problems - 1} more." if found.problems > 1 else ""
        return _critical(
            "PitrRepositoryDamaged",
            f"The repository is not whole: {found.first_problems[0]}.{more}",
            "pitr verify lists everything. Take a base backup now (pitr backup now --full), then see who removed it.",
        )
    since = found.at or status.started_at
    if _age(since, status) < VERIFICATION_AGE.total_seconds():
        return None
    reason = f" The last attempt failed: {found.failure.reason}" if found.failure is not None else ""
    return _warning(
        "PitrVerificationStale",
        f"The repository has not been verified since {time_text(since)}.{reason}",
        "It is tried every hour; by hand: pitr verify",
    )


def _content(status: AgentStatus) -> Finding | None:
    found = status.reading
    if found is None or not found.problems:
        return None
    more = f" And {found.problems - 1} more." if found.problems > 1 else ""
    return _critical(
        "PitrRepositoryDamaged",
        f"What was read back is damaged: {found.first_problems[0]}.{more}",
        "Take a base backup now: pitr backup now --full. To read one again: pitr verify --deep NAME",
    )


def _drill(status: AgentStatus) -> Finding | None:
    succeeded = status.drills.succeeded if status.drills is not None else None
    failed = status.drills.failed if status.drills is not None else None
    if failed is not None and (succeeded is None or succeeded.at < failed.at):
        why = "the restored server does not pass its checks" if failed.exit_code == 52 else "a restore would fail, too"
        return _critical(
            "PitrDrillFailed",
            f"The restore drill of {failed.backup} failed at {time_text(failed.at)} with exit code {failed.exit_code}: "
            f"{why}.",
            "The log of the drill's Job says why. Remove the cause, then run one now: docs/runbook.md, Drills",
        )
    if succeeded is None or _age(succeeded.at, status) < DRILL_AGE.total_seconds():
        return None
    return _warning(
        "PitrDrillStale",
        f"No restore has been proven for {seconds_text(_age(succeeded.at, status))}: the last drill that succeeded was "
        f"at {time_text(succeeded.at)}.",
        "See whether the CronJob of the drill is suspended, or its pod cannot be scheduled; by hand: pitr drill",
    )


def _expiry(status: AgentStatus) -> Finding | None:
    failure = status.expiry.failure if status.expiry is not None else None
    if failure is None:
        return None
    return _warning(
        "PitrExpiryFailing",
        f"The last expiry failed at {time_text(failure.at)}: {failure.reason}",
        "The bucket grows until it works again. It is tried every hour; by hand: pitr expire",
    )


def _memory(status: AgentStatus) -> Finding | None:
    memory = status.memory
    if memory is None or memory.used_bytes < MEMORY_SHARE * memory.limit_bytes:
        return None
    return _warning(
        "PitrMemoryNearBudget",
        f"{memory.used_bytes >> 20} of {memory.limit_bytes >> 20} MiB of the memory budget are in use: work waits.",
        "If it stays so, raise PITR_MEMORY_LIMIT and the container's memory limit with it.",
    )


_RULES: tuple[_Rule, ...] = (
    _foreign, _store, _credentials, _volume, _silent, _backlog, _gap, _no_backup, _window, _verification, _content,
    _corrupt_pages, _drill, _stalled, _expiry, _memory,
)  # fmt: skip


def _age(moment: datetime, status: AgentStatus) -> float:
    return (status.now - moment).total_seconds()


def _reason(status: AgentStatus) -> str:
    if status.wal.failure is None or _store(status) is not None or _foreign(status) is not None:  # said there
        return ""
    return f" The last attempt failed: {status.wal.failure.reason}"
