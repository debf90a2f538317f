"""PostgreSQL run through recovery: every outcome told for what it is, and none lost by a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent.domain.control_file import ClusterState
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.server_checks import RECOVERY_SETTINGS_FILE
from agent.errors import ConfigError
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_temporary_directory, unprivileged
from agent.lab.processes import has_ended_in, is_running, kill_tree
from agent.lab.waiting import wait_until
from agent.postgres.data_directory import DataDirectory
from agent.postgres.postmaster import find_postgres, refuse_root
from agent.restore.recovery_settings import (
    AUTO_CONF,
    RECOVERY_SIGNAL,
    recovery_settings,
    remove_recovery_settings,
    write_recovery_settings,
)
from tests.support.postgres import FindBinaries, copy_if_there

NEWEST = 18
every_version = pytest.mark.parametrize("scene", [13, 15, NEWEST], indirect=True)
ROWS_A_STEP = 100
STEPS = 4
SECONDS = 60


@dataclass(frozen=True)
class Scene:
    """A base backup, and an archive with a restore point after each of `STEPS` steps of `ROWS_A_STEP` rows."""

    directory: Path
    major: int
    program: Path

    @property
    def archive(self) -> Path:
        return self.directory / "archive"

    @property
    def middle_segment(self) -> str:
        segments = sorted(path.name for path in self.archive.iterdir() if len(path.name) == 24)
        return segments[len(segments) // 2]


def record(scene: Scene, primary: PostgresCluster) -> None:
    """Let a primary archive its steps, and copy it before the first one."""
    scene.archive.mkdir()
    hand_over(scene.archive)
    primary.initdb(segment_megabytes=1)
    primary.configure(
        fsync=False,
        archive_mode=True,
        archive_command=f"cp %p {scene.archive}/%f",
        max_prepared_transactions=5,
        shared_buffers="16MB",
    )
    primary.start()
    with primary.connect() as session:
        start, stop = ("pg_backup_start", "pg_backup_stop()")
        if scene.major < 15:
            start, stop = ("pg_start_backup", "pg_stop_backup(false)")
        session.execute("CREATE TABLE rows (step integer)")
        session.execute(f"SELECT {start}('b', true{', false' if scene.major < 15 else ''})")
        backup = scene.directory / "backup"
        not_kept = shutil.ignore_patterns("postmaster.*", "0" * 8 + "?" * 16, "*.ready", "*.done")
        shutil.copytree(primary.data_directory, backup, ignore=not_kept, copy_function=copy_if_there)
        row = session.execute(f"SELECT labelfile FROM {stop}".encode()).fetchone()
        assert row is not None
        (backup / "backup_label").write_text(row[0])
        with primary.connect(autocommit=False) as other:
            other.execute("INSERT INTO rows VALUES (-1)")
            other.execute("PREPARE TRANSACTION 'in doubt'")
        for step in range(STEPS):
            session.execute(f"INSERT INTO rows SELECT {step} FROM generate_series(1, {ROWS_A_STEP})".encode())
            session.execute(f"SELECT pg_create_restore_point('step {step}')".encode())
            segment = primary.switch_wal()
    primary.wait_until_archived(segment)
    primary.stop()


@pytest.fixture(scope="module")
def scene(request: pytest.FixtureRequest, postgres_binaries: FindBinaries) -> Iterator[Scene]:
    """A recorded archive of the newest version, or of `every_version`."""
    binaries = postgres_binaries(getattr(request, "param", NEWEST))
    scene = Scene(make_temporary_directory("pitr-scene-"), binaries.major, binaries["postgres"])
    with PostgresCluster(scene.directory / "primary", binaries) as primary:
        record(scene, primary)
    yield scene
    shutil.rmtree(scene.directory)


@dataclass
class Restored:
    """A hydrated copy of the scene's backup, run by the program `tests.support.recover`."""

    scene: Scene
    path: Path

    def write(self, target: RestoreTarget, command: str | None = None) -> None:
        """Write recovery settings that fetch by `command` (default: copy from the archive)."""
        fetch = f"cp {self.scene.archive}/%f %p" if command is None else command
        write_recovery_settings(
            self.path, recovery_settings(replace(target, timeline="1"), fetch), keep_archiving=False
        )
        hand_over(self.path)

    def start(self) -> subprocess.Popen[str]:
        """Start the program."""
        command = unprivileged([sys.executable, "-m", "tests.support.recover", self.scene.program, self.path])
        environment = {**os.environ, "TMPDIR": str(self.path.parent)}  # killed, it leaves its private directory
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def recover(self) -> dict[str, Any]:
        """Run the program to its end; return what it printed."""
        return finish(self.start())

    def state(self) -> ClusterState:
        return DataDirectory(self.path).control_file().state

    def rows(self, postgres_binaries: FindBinaries) -> int:
        """Start the restored server as anyone would and count."""
        with PostgresCluster(self.path, postgres_binaries(self.scene.major)) as cluster:
            cluster.start()
            assert cluster.value("SHOW archive_mode") == "off"
            count: int = cluster.value("SELECT count(*) FROM rows")
            cluster.stop()
        return count


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        kill_tree(process)
    result: dict[str, Any] = json.loads(said)
    return result


@pytest.fixture
def restored(scene: Scene, lab_directory: Path) -> Restored:
    path = lab_directory / "restored"
    shutil.copytree(scene.directory / "backup", path)
    return Restored(scene, path)


def at_step(step: int) -> RestoreTarget:
    return RestoreTarget(TargetKind.NAME, name=f"step {step}")


def wait_for_nothing_running_in(path: Path) -> None:
    wait_until(lambda: has_ended_in(path), seconds=SECONDS, what="PostgreSQL to end")


def blocking_at(segment: str, restored: Restored) -> tuple[str, Path, Path]:
    """Return a restore_command that says it has come to `segment` by one file and waits there for another."""
    come, go = restored.path.with_name("come"), restored.path.with_name("go")
    wait = f"touch {come}; while [ ! -e {go} ]; do sleep 0.02; done"
    return f"if [ %f = {segment} ]; then {wait}; fi; cp {restored.scene.archive}/%f %p", come, go


@every_version
def test_recovery_to_a_target_ends_promoted_and_stopped(restored: Restored, postgres_binaries: FindBinaries) -> None:
    restored.write(at_step(1))
    result = restored.recover()
    assert result["new_timeline"] == 2
    assert 'restore point "step 1"' in result["stopped"]
    assert result["last_commit_at"] is not None
    assert result["prepared_transactions"] == 1
    assert restored.state() is ClusterState.SHUT_DOWN
    assert not (restored.path / "postmaster.opts").exists()
    assert not (restored.path / RECOVERY_SIGNAL).exists()
    assert restored.rows(postgres_binaries) == 2 * ROWS_A_STEP


@every_version
def test_settings_of_the_recovery_do_not_outlive_it(restored: Restored, postgres_binaries: FindBinaries) -> None:
    restored.write(at_step(0))
    restored.recover()
    assert not (restored.path / RECOVERY_SETTINGS_FILE).exists(), "PostgreSQL itself removes it when recovery ends"
    remove_recovery_settings(restored.path)
    hand_over(restored.path)
    with PostgresCluster(restored.path, postgres_binaries(restored.scene.major)) as cluster:
        cluster.start()
        cluster.execute("ALTER SYSTEM RESET archive_mode")
        left = (restored.path / AUTO_CONF).read_text()
        assert [line for line in left.splitlines() if not line.startswith("#")] == []
        assert (
            cluster.value("SELECT count(*) FROM pg_settings WHERE name LIKE 'recovery_target%' AND setting <> boot_val")
            == 0
        )
        assert cluster.value("SHOW hot_standby") == "on"


@every_version
def test_without_a_target_all_archived_wal_is_replayed(restored: Restored, postgres_binaries: FindBinaries) -> None:
    restored.write(RestoreTarget())
    result = restored.recover()
    assert result["stopped"] is None
    assert restored.rows(postgres_binaries) == STEPS * ROWS_A_STEP


def test_a_configuration_that_lives_elsewhere_is_not_needed(
    restored: Restored, postgres_binaries: FindBinaries
) -> None:
    configuration = {name: (restored.path / name).read_bytes() for name in ("postgresql.conf", "pg_hba.conf")}
    for name in (*configuration, "pg_ident.conf"):
        (restored.path / name).unlink()
    restored.write(at_step(1))
    assert restored.recover()["new_timeline"] == 2
    for name, content in configuration.items():
        (restored.path / name).write_bytes(content)
    assert restored.rows(postgres_binaries) == 2 * ROWS_A_STEP


def test_what_the_backup_is_configured_to_do_is_not_done_by_the_copy(restored: Restored, lab_directory: Path) -> None:
    elsewhere = lab_directory / "elsewhere"
    with (restored.path / "postgresql.conf").open("a") as file:
        file.write(
            f"data_directory = '/nonexistent'\nexternal_pid_file = '{elsewhere}'\nlogging_collector = on\n"
            f"unix_socket_directories = '{lab_directory}'\nlog_line_prefix = 'x '\n"
            f"recovery_target_time = '2000-01-01 00:00:00+00'\nrecovery_min_apply_delay = '1d'\n"
            f"archive_cleanup_command = 'touch {elsewhere}'\nrecovery_end_command = 'touch {elsewhere}'\n"
            f"archive_command = 'touch {elsewhere}'\nlog_min_messages = fatal\nlisten_addresses = '*'\n"
        )
    restored.write(at_step(1))
    assert restored.recover()["new_timeline"] == 2
    assert not elsewhere.exists()
    assert not list(lab_directory.glob(".s.PGSQL.*"))
    assert not list((restored.path / "pg_wal" / "archive_status").glob("*.ready"))


def test_the_successor_leaves_what_is_to_be_archived_to_the_server_that_follows(
    restored: Restored, lab_directory: Path
) -> None:
    archived = lab_directory / "archived"
    with (restored.path / "postgresql.conf").open("a") as file:
        file.write(f"archive_mode = on\narchive_command = 'touch {archived}'\n")
    settings = recovery_settings(replace(at_step(1), timeline="1"), f"cp {restored.scene.archive}/%f %p")
    write_recovery_settings(restored.path, settings, keep_archiving=True)
    hand_over(restored.path)
    assert restored.recover()["new_timeline"] == 2
    assert (restored.path / "pg_wal" / "archive_status" / "00000002.history.ready").exists()
    assert not archived.exists()


def test_a_target_that_never_comes_is_refused_with_a_next_step(restored: Restored) -> None:
    restored.write(RestoreTarget(TargetKind.NAME, name="no such point"))
    result = restored.recover()
    assert result["error"] == "RestoreFailed"
    assert "recovery ended before configured recovery target was reached" in result["message"]
    assert "without one to replay to the end" in result["hint"]
    wait_for_nothing_running_in(restored.path)


def test_a_hook_that_gives_up_stops_recovery_and_the_next_run_goes_on(
    restored: Restored, postgres_binaries: FindBinaries
) -> None:
    segment = restored.scene.middle_segment
    restored.write(RestoreTarget(), f"[ %f != {segment} ] || exit 255; cp {restored.scene.archive}/%f %p")
    result = restored.recover()
    assert f'could not restore file "{segment}" from archive' in result["message"]
    assert "replay goes on where it stopped" in result["hint"]
    restored.write(RestoreTarget())
    assert restored.recover()["new_timeline"] == 2
    assert restored.rows(postgres_binaries) == STEPS * ROWS_A_STEP


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["cancelled", "killed"])
def test_a_run_cut_short_in_replay_takes_postgresql_with_it_and_the_next_one_completes(
    restored: Restored, postgres_binaries: FindBinaries, how: signal.Signals
) -> None:
    command, come, go = blocking_at(restored.scene.middle_segment, restored)
    restored.write(at_step(STEPS - 1), command)
    with restored.start() as process:
        try:
            wait_until(come.exists, seconds=SECONDS, what="replay to reach the middle")
            postmaster = int((restored.path / "postmaster.pid").read_text().split()[0])
            process.send_signal(how)
            process.wait(SECONDS)
            wait_for_nothing_running_in(restored.path)
        finally:
            kill_tree(process)
    assert not is_running(postmaster)
    assert restored.state() is not ClusterState.IN_PRODUCTION
    go.touch()
    assert restored.recover()["new_timeline"] == 2
    assert restored.rows(postgres_binaries) == STEPS * ROWS_A_STEP


def test_a_second_run_on_the_same_directory_is_refused_and_disturbs_nothing(restored: Restored) -> None:
    command, come, go = blocking_at(restored.scene.middle_segment, restored)
    restored.write(RestoreTarget(), command)
    first = restored.start()
    wait_until(come.exists, seconds=SECONDS, what="replay to reach the middle")
    second = restored.recover()
    assert "postmaster.pid" in second["message"]
    assert "Another server runs in this directory" in second["hint"]
    go.touch()
    assert finish(first)["new_timeline"] == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("shared_preload_libraries = 'no_such_library'", "no_such_library"),
        ("shared_buffers = 'many'", "shared_buffers"),
        ("this is no setting at all", "syntax error"),
        ("no_such_setting = 1", "no_such_setting"),
    ],
)
def test_a_configuration_the_image_cannot_run_is_told_clearly(restored: Restored, line: str, told: str) -> None:
    with (restored.path / "postgresql.conf").open("a") as file:
        file.write(f"{line}\n")
    restored.write(at_step(1))
    result = restored.recover()
    assert result["error"] == "RestoreFailed"
    assert told in result["message"]


def test_a_missing_label_is_never_blamed_on_the_label(restored: Restored) -> None:
    restored.write(at_step(1))
    for segment in restored.scene.archive.iterdir():
        (restored.path / "pg_wal" / segment.name).unlink(missing_ok=True)
    restored.write(at_step(1), "exit 1; : %f %p")
    result = restored.recover()
    assert "could not locate required checkpoint record" in result["message"]
    assert "Never remove backup_label" in result["hint"]


@pytest.mark.parametrize("name", ["it's", "back\\slash", "a # comment", "Zoë ünïcode", "'; archive_mode = on"])
def test_postgresql_reads_back_the_name_that_was_written(restored: Restored, name: str) -> None:
    restored.write(RestoreTarget(TargetKind.NAME, name=name))
    command = unprivileged([restored.scene.program, "-D", restored.path, "-C", "recovery_target_name"])
    said = subprocess.run(command, capture_output=True, check=True, text=True, timeout=SECONDS)
    assert said.stdout == f"{name}\n"


async def test_the_programs_of_the_right_version_are_found(postgres_binaries: FindBinaries) -> None:
    binaries = postgres_binaries(15)
    assert await find_postgres(15, binaries.directory) == binaries["postgres"]


async def test_a_link_to_a_program_leads_to_all_of_its_version(
    postgres_binaries: FindBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = postgres_binaries(15)
    (tmp_path / "postgres").symlink_to(binaries["postgres"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await find_postgres(15, None) == binaries["postgres"].resolve()


async def test_programs_of_another_version_are_refused_naming_both(postgres_binaries: FindBinaries) -> None:
    with pytest.raises(ConfigError, match=r"of PostgreSQL 13, but there is PostgreSQL 15 in") as caught:
        await find_postgres(13, postgres_binaries(15).directory)
    assert "PITR_POSTGRES_BIN" in caught.value.hint


async def test_a_directory_without_programs_is_refused_naming_it(tmp_path: Path) -> None:
    program = tmp_path / "postgres"
    program.write_text("not a program")
    program.chmod(0o644)
    with pytest.raises(ConfigError, match=f"none in {tmp_path}"):
        await find_postgres(15, tmp_path)
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=f"a program that tells no version in {tmp_path}"):
        await find_postgres(15, tmp_path)


def test_root_is_refused_and_nobody_else() -> None:
    if os.geteuid() != 0:
        refuse_root()
        return
    with pytest.raises(ConfigError, match="cannot run as root"):
        refuse_root()
