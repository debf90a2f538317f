"""What PostgreSQL itself makes of the hook's exit codes."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.waiting import wait_until
from tests.hooks.scripted_agent import ScriptedAgent, reply, stall
from tests.support.postgres import MakeCluster

ROWS = 1000
SECONDS = 60  # less than the patience of a hook that PostgreSQL has to end, or that has to end itself


@dataclass
class Archive:
    """An agent that serves `files`, knows of no others, and fails or falls silent where it is told to."""

    agent: ScriptedAgent = field(init=False)
    files: dict[str, bytes] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)

    def answer(self, connection: socket.socket) -> None:
        """Answer the latest request."""
        method, path, *_ = self.agent.requests[-1].decode().split()
        name = Path(path).name
        if name in self.silent:
            stall(connection)
        elif name in self.failing:
            connection.sendall(reply(502, b"the store is on fire. Put it out.\n"))
        elif method == "POST":
            connection.sendall(reply(200, wal_file=name))
        elif name in self.files:
            connection.sendall(reply(200, self.files[name], wal_file=name))
        else:
            connection.sendall(reply(410, wal_file=name))

    def asked(self) -> list[str]:
        """Name the files asked for so far, in order."""
        return [Path(request.decode().split()[1]).name for request in self.agent.requests]


@pytest.fixture
def archive(lab_directory: Path) -> Iterator[Archive]:
    """The agent that the servers of a test ask."""
    archive = Archive()
    archive.agent = ScriptedAgent(lab_directory / "agent.sock", archive.answer)
    hand_over(lab_directory)
    with archive.agent:
        yield archive


@pytest.fixture
def restored(archive: Archive, lab_directory: Path, make_cluster: MakeCluster, hook_directory: Path) -> PostgresCluster:
    """A cluster that has yet to replay `ROWS` rows in each of three WAL segments, which lie in the archive."""
    copies = lab_directory / "copies"
    copies.mkdir()
    hand_over(copies)
    primary = make_cluster(name="primary", archive_mode=True, archive_command=f'cp %p "{copies}/%f"')
    primary.start()
    primary.execute("CREATE TABLE t (i int)")
    for _ in range(3):
        primary.execute(f"INSERT INTO t SELECT generate_series(1, {ROWS})")
        primary.wait_until_archived(primary.switch_wal())
    primary.stop("immediate")
    archive.files.update({path.name: path.read_bytes() for path in copies.iterdir()})
    return make_cluster(
        name="restored",
        restore_command=f"{hook_directory}/wal-restore.sh %f %p --socket {archive.agent.path}",
        wal_retrieve_retry_interval="100ms",
        max_connections=100,  # as the primary's first checkpoint has it
    )


def rows(cluster: PostgresCluster) -> int:
    """Count the rows that have arrived, 0 before the table has."""
    exists = cluster.value("SELECT to_regclass('t') IS NOT NULL")
    return int(cluster.value("SELECT count(*) FROM t")) if exists else 0


def is_promoted(cluster: PostgresCluster) -> bool:
    """Tell whether recovery has ended."""
    return not cluster.value("SELECT pg_is_in_recovery()")


def assert_recovers_whole(cluster: PostgresCluster) -> None:
    """Start the server, and see it end its recovery with every row."""
    cluster.start()
    wait_until(lambda: is_promoted(cluster), seconds=SECONDS, what="the end of recovery")
    assert rows(cluster) == 3 * ROWS


def test_a_failing_agent_stops_recovery_and_once_mended_nothing_is_missing(
    archive: Archive, restored: PostgresCluster
) -> None:
    archive.failing.add(max(archive.files))
    (restored.data_directory / "recovery.signal").touch()
    restored.start(wait=False)
    assert restored.wait_until_ended() != 0
    assert "the agent answered 502: the store is on fire. Put it out. " in restored.log_text()
    assert "selected new timeline" not in restored.log_text()
    archive.failing.clear()
    assert_recovers_whole(restored)


def test_a_standby_outlives_a_failing_agent_and_goes_on_once_it_is_mended(
    archive: Archive, restored: PostgresCluster
) -> None:
    archive.failing.update(archive.files)
    (restored.data_directory / "standby.signal").touch()
    restored.start()
    assert archive.agent.asked.wait(SECONDS)
    assert (rows(restored), is_promoted(restored)) == (0, False)
    archive.failing.clear()
    wait_until(lambda: rows(restored) == 3 * ROWS, seconds=SECONDS, what="the rows to arrive")
    assert not is_promoted(restored)


def test_a_shutdown_during_a_restore_is_immediate_and_the_next_start_resumes(
    archive: Archive, restored: PostgresCluster
) -> None:
    last = max(archive.files)
    archive.silent.add(last)
    (restored.data_directory / "recovery.signal").touch()
    restored.start(wait=False)
    wait_until(lambda: last in archive.asked(), seconds=SECONDS, what="the last segment to be asked for")
    restored.stop("fast", seconds=SECONDS)
    assert (restored.data_directory / "recovery.signal").exists()
    archive.silent.clear()
    assert_recovers_whole(restored)


def test_postgresql_counts_a_refused_archiving_and_asks_again(
    archive: Archive, make_cluster: MakeCluster, hook_directory: Path
) -> None:
    command = f"{hook_directory}/wal-archive.sh %p %f --socket {archive.agent.path}"
    primary = make_cluster(archive_mode=True, archive_command=command)
    primary.start()
    segment = primary.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    archive.failing.add(segment)
    primary.execute("CREATE TABLE t (i int)")
    assert primary.switch_wal() == segment
    failed = "SELECT failed_count FROM pg_stat_archiver"
    wait_until(lambda: primary.value(failed) >= 1, seconds=SECONDS, what="the failure to be counted")
    archive.failing.clear()
    primary.wait_until_archived(segment)
    assert f"archive {segment}: the agent answered 502" in primary.log_text()


def test_a_silent_agent_holds_up_a_shutdown_for_no_longer_than_a_few_short_calls(
    archive: Archive, make_cluster: MakeCluster, hook_directory: Path
) -> None:
    command = f"{hook_directory}/wal-archive.sh %p %f --socket {archive.agent.path} --timeout 300"
    primary = make_cluster(archive_mode=True, archive_command=command)
    primary.start()
    segment = primary.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    archive.silent.add(segment)
    primary.execute("CREATE TABLE t (i int)")
    primary.switch_wal()
    assert archive.agent.asked.wait(SECONDS)
    primary.stop("fast", seconds=SECONDS)
    assert (primary.data_directory / "pg_wal" / "archive_status" / f"{segment}.ready").exists()
