"""What PostgreSQL says in recovery: told apart, and turned into a next step."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis.strategies import lists, text

from agent.postgres.recovery_log import RecoveryLog, recovery_failure

MEBIBYTE = 1 << 20
PROMOTED = """\
LOG:  starting PostgreSQL 15.18 on x86_64-pc-linux-gnu
LOG:  database system was interrupted; last known up at 2026-11-23 03:55:58 UTC
cp: cannot stat '/archive/00000002.history': No such file or directory
LOG:  starting point-in-time recovery to "p2"
LOG:  restored log file "00000001.history" from archive
LOG:  restored log file "000000010000000000000009" from archive
LOG:  redo starts at 0/900028
LOG:  consistent recovery state reached at 0/900100
LOG:  restored log file "00000001000000000000000B" from archive
LOG:  recovery stopping at restore point "p2", time 2026-11-23 03:55:58.96473+00
LOG:  redo done at 0/A0FAF8 system usage: CPU: user: 0.00 s, system: 0.00 s, elapsed: 0.02 s
LOG:  last completed transaction was at log time 2026-11-23 03:55:58.96457+00
LOG:  restored log file "00000001000000000000000A" from archive
LOG:  selected new timeline ID: 2
LOG:  archive recovery complete
LOG:  recovering prepared transaction 731 from shared memory
LOG:  database system is ready to accept connections
"""


def fed(said: str) -> RecoveryLog:
    log = RecoveryLog(MEBIBYTE)
    for line in said.splitlines():
        log.feed(line)
    return log


def test_a_recovery_that_came_through_is_told_with_its_figures() -> None:
    log = fed(PROMOTED)
    assert log.is_ready
    assert log.restored_lsn == 0xC * MEBIBYTE
    assert log.stopped == 'recovery stopping at restore point "p2", time 2026-11-23 03:55:58.96473+00'
    assert log.redo_done_lsn == 0xA0FAF8
    assert log.last_commit_at == datetime(2026, 11, 23, 3, 55, 58, 964570, tzinfo=UTC)
    assert log.new_timeline == 2
    assert log.prepared_transactions == 1
    assert log.fatal is None


def test_a_read_only_server_is_not_ready() -> None:
    assert not fed("LOG:  database system is ready to accept read-only connections").is_ready


@pytest.mark.parametrize(
    ("fatal", "advice"),
    [
        ("recovery ended before configured recovery target was reached", "earlier target"),
        ("requested recovery stop point is before consistent recovery point", "older BACKUP_NAME"),
        ("requested timeline 2 is not a child of this server's history", "TARGET_TIMELINE"),
        ("requested timeline 3 does not contain minimum recovery point 0/5000100 on timeline 1", "TARGET_TIMELINE"),
        ("could not locate required checkpoint record", "Never remove backup_label"),
        ("could not locate a valid checkpoint record", "Never remove backup_label"),
        ("WAL ends before end of online backup", "pitr verify"),
        (
            'could not restore file "00000001000000000000000B" from archive: child process exited with exit code 255',
            "replay goes on where it stopped",
        ),
        (
            'archive file "00000001000000000000000B" has wrong size: 524288 instead of 1048576',
            "archived segment is damaged",
        ),
        ("WAL was generated with wal_level=minimal, cannot continue recovering", "later base backup"),
        ("recovery aborted because of insufficient parameter settings", "hot_standby"),
        ('could not access file "timescaledb": No such file or directory', "shared_preload_libraries"),
        ("database files are incompatible with server", "same major version"),
        ("could not map anonymous shared memory: Cannot allocate memory", "memory"),
        ('lock file "postmaster.pid" already exists', "Another server"),
        ('data directory "/data" has invalid permissions', "0700"),
        ('could not write to file "base/5/1": No space left on device', "Enlarge the volume"),
        ("maximum number of prepared transactions reached", "Run the restore again"),
        ("requested WAL segment pg_wal/00000001000000000000000A has already been removed", "copy that one"),
        ("something never seen before\nHINT:  Increase the limit.", "Increase the limit. Run the restore again"),
    ],
)
def test_each_way_to_fail_names_a_next_step(fatal: str, advice: str) -> None:
    error = recovery_failure(fed(f"LOG:  redo starts at 0/900028\nFATAL:  {fatal}\nLOG:  shutting down"), 1)
    assert fatal.partition("\n")[0] in error.message
    assert advice in error.hint


def test_the_first_fatal_line_counts_with_its_detail() -> None:
    said = "FATAL:  requested timeline 2 is not a child\nDETAIL:  Latest checkpoint is at 0/9.\nFATAL:  b\nDETAIL:  c"
    assert fed(said).fatal == "requested timeline 2 is not a child (Latest checkpoint is at 0/9.)"


def test_a_target_that_was_missed_names_the_last_transaction() -> None:
    missed = "FATAL:  recovery ended before configured recovery target was reached"
    error = recovery_failure(fed(PROMOTED.splitlines()[11] + "\n" + missed), 1)
    assert "2026-11-23T03:55:58.964570Z" in error.message


def test_what_kept_the_agent_from_delivering_wal_is_told() -> None:
    segment = "00000001000000000000001D"
    said = (
        f"pitr-hook: restore {segment}: the agent answered 503: /data/pg_wal/pitr.spool cannot be written: No space"
        " left on device. Check the WAL volume, and its free space. (waited 600 s). The agent's log says more."
        " Recovery stops here and loses nothing: once this is mended, start PostgreSQL again.\n"
        f'FATAL:  could not restore file "{segment}" from archive: child process exited with exit code 255'
    )
    told = recovery_failure(fed(said), 1).one_line()
    assert "/data/pg_wal/pitr.spool cannot be written: No space left on device." in told
    assert "waited" not in told
    assert "Enlarge the volume. Run the restore again" in told


def test_a_mistake_in_the_configuration_is_shown() -> None:
    said = (
        'LOG:  syntax error in file "/data/postgresql.conf" line 5, near end of line\n'
        'FATAL:  configuration file "/data/postgresql.conf" contains errors'
    )
    assert "line 5" in recovery_failure(fed(said), 1).message


def test_a_server_that_was_stopped_from_outside_is_told_from_one_that_failed() -> None:
    error = recovery_failure(fed("LOG:  received fast shutdown request\nLOG:  shutting down"), 0)
    assert "was stopped before recovery was done" in error.message


def test_a_program_that_cannot_run_is_quoted() -> None:
    error = recovery_failure(fed("postgres: error while loading shared libraries: libxml2.so.2"), 127)
    assert "libxml2.so.2" in error.message


@given(lists(text()))
def test_no_line_stops_the_reader(lines: list[str]) -> None:
    log = RecoveryLog(MEBIBYTE)
    for line in lines:
        log.feed(line)
        log.feed(f"LOG:  last completed transaction was at log time {line}")
