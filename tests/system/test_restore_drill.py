"""A restore drill proves that the repository can be restored, leaves nothing, and touches nothing but its own."""

import json
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.domain.restore_target import parse_time
from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.privileges import hand_over
from agent.lab.processes import kill_tree
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from agent.restore.marker import MARKER_NAME, MarkerStage, RestoreMarker, write_marker
from tests.support.agent_process import RunPitr
from tests.support.pushgateway import pushgateway
from tests.support.stack import Stack

COMMITS = 20


def record(stack: Stack, pitr: RunPitr) -> None:
    """Take a base backup, and commit something after it."""
    stack.cluster.execute("CREATE TABLE committed AS SELECT now() AS at")
    done = pitr("backup", "now", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    for _ in range(COMMITS):
        stack.cluster.execute("INSERT INTO committed DEFAULT VALUES")
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())


def drill_settings(stack: Stack, scratch: Path) -> dict[str, str]:
    return {
        **stack.repository,
        "PGDATA": str(scratch),
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries.directory),
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_SOCKET": str(scratch.parent / "drill.sock"),
    }


def listed(stack: Stack, pitr: RunPitr) -> list[dict[str, Any]]:
    backups: list[dict[str, Any]] = json.loads(pitr("backup", "list", "--json", settings=stack.agent.settings).stdout)
    return backups


def drill_findings(stack: Stack, pitr: RunPitr) -> list[str]:
    """Return what an agent calls wrong with drills that was not there while they ran."""
    stack.agent.restart()

    def told() -> dict[str, Any]:
        status: dict[str, Any] = json.loads(pitr("status", "--json", settings=stack.agent.settings).stdout)
        return status if status["drills"] is not None else {}

    status = wait_until(told, seconds=60, what="the agent to look for drills")
    return [finding["alert"] for finding in status["findings"] if "Drill" in finding["alert"]]


def test_a_drill_proves_a_moment_tells_it_and_throws_the_server_away(
    stack: Stack, pitr: RunPitr, lab_directory: Path
) -> None:
    spaces = lab_directory / "spaces"
    spaces.mkdir()
    hand_over(spaces)
    stack.cluster.execute(f"CREATE TABLESPACE side LOCATION '{spaces}'", "CREATE TABLE aside (x int) TABLESPACE side")
    record(stack, pitr)
    in_bucket = pitr("window", "--json", settings=stack.agent.settings).stdout
    scratch = lab_directory / "scratch"
    with pushgateway() as gateway:
        settings = drill_settings(stack, scratch) | {
            "PITR_PUSHGATEWAY": gateway.url,
            "PITR_VALIDATE": "amcheck,checksums",
            "PITR_VALIDATE_SQL": "SELECT count(*) BETWEEN 1 AND 20 FROM committed; "
            "SELECT current_setting('archive_mode') = 'off'; SELECT current_setting('listen_addresses') = ''; "
            "SELECT current_setting('max_worker_processes') = '0'",
        }
        first = pitr("drill", "--json", "--seed", "2", settings=settings)
        assert first.returncode == 0, first.stderr
        told = json.loads(first.stdout)
        assert [check["passed"] for check in told["restored"]["checks"]] == [True] * 6
        assert (told["restored"]["last_commit_at"] or "") <= told["moment"]  # none, if it is before the first
        samples = gateway.samples()
        assert samples["pitr_drill_moment_timestamp_seconds"] == parse_time("", told["moment"]).timestamp()
        assert samples["pitr_drill_duration_seconds"] == told["seconds"] > 0
        assert samples["pitr_drill_last_success_timestamp_seconds"] > samples["pitr_drill_moment_timestamp_seconds"]
        assert list(scratch.iterdir()) == []
        (noted,) = listed(stack, pitr)
        assert (noted["drilled_to"], noted["drill_seconds"]) == (told["moment"], told["seconds"])
        assert (noted["drill_failed_at"], noted["drill_exit_code"]) == (None, None)
        again = pitr("drill", "--json", "--seed", "2", settings=settings)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["moment"] == told["moment"]

        failing = pitr("drill", settings={**settings, "PITR_VALIDATE_SQL": "SELECT false AS complete"})
        assert failing.returncode == 52, failing.stderr
        assert set(gateway.samples()) == {"pitr_drill_last_failure_timestamp_seconds"}
        assert gateway.pushed[-1][0] == "POST"  # the last success stays
        assert (scratch / MARKER_NAME).exists()
        (noted,) = listed(stack, pitr)
        assert noted["drill_failed_at"] > noted["drilled_at"] > noted["finish_time"]
        assert noted["drill_exit_code"] == 52
        assert drill_findings(stack, pitr) == ["PitrDrillFailed"]
        assert pitr("drill", settings=settings).returncode == 0
    assert list(scratch.iterdir()) == []
    assert list(lab_directory.glob("scratch.tablespaces/*/*")) == []
    assert any(spaces.iterdir())
    assert drill_findings(stack, pitr) == []
    (noted,) = listed(stack, pitr)
    drilled_at = parse_time("", noted["drilled_at"]).timestamp()
    assert stack.agent.metric("pitr_drill_last_success_timestamp_seconds") == drilled_at
    assert stack.agent.metric("pitr_drill_duration_seconds") == noted["drill_seconds"]
    shown = pitr("backup", "show", noted["name"], settings=stack.agent.settings)
    assert noted["drilled_at"] in shown.stdout
    assert pitr("window", "--json", settings=stack.agent.settings).stdout == in_bucket


def test_a_drill_that_is_ended_or_finds_the_store_away_proves_nothing_and_alarms_nobody(
    stack: Stack, pitr: RunPitr, lab_directory: Path, s3_server_of_its_own: SeaweedServer
) -> None:
    record(stack, pitr)
    hooks, come = lab_directory / "hooks", lab_directory / "come"
    hooks.mkdir()
    (hooks / "wal-restore.sh").write_text(f"#!/bin/sh\ntouch {come}\nexec sleep 60\n")
    (hooks / "wal-restore.sh").chmod(0o755)
    hand_over(lab_directory)
    with pushgateway() as gateway:
        settings = drill_settings(stack, lab_directory / "scratch") | {"PITR_PUSHGATEWAY": gateway.url}
        environment = agent_environment({**settings, "PITR_HOOK_DIR": str(hooks)})
        with subprocess.Popen(
            pitr_command("drill"), env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as drill:
            try:
                wait_until(come.exists, seconds=60, what="replay to begin")
                drill.send_signal(signal.SIGTERM)
                _, said = drill.communicate(timeout=60)
                assert drill.returncode == 51
                assert "the drill was interrupted" in said
            finally:
                kill_tree(drill)
        come.unlink()
        go = lab_directory / "go"
        hook = stack.hooks / "wal-restore.sh"
        (hooks / "wal-restore.sh").write_text(
            f'#!/bin/sh\ntouch {come}; until [ -e {go} ]; do sleep 0.1; done\nPITR_HOOK_TIMEOUT=5 exec {hook} "$@"\n'
        )
        with subprocess.Popen(
            pitr_command("drill"), env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as second:
            try:
                wait_until(come.exists, seconds=60, what="replay to begin")
                s3_server_of_its_own.stop()
                go.touch()
                _, said = second.communicate(timeout=60)
            finally:
                kill_tree(second)
        assert second.returncode == 20, said
        assert "PostgreSQL gave up recovery" in said.splitlines()[-1]
        assert "That says nothing of the base backup" in said.splitlines()[-1]
        away = pitr("drill", settings=settings)
        assert away.returncode == 20, away.stderr
        assert gateway.pushed == []
    s3_server_of_its_own.start()
    (noted,) = listed(stack, pitr)
    assert (noted["drilled_at"], noted["drill_failed_at"]) == (None, None)


def test_a_drill_refuses_every_directory_that_is_not_its_own(stack: Stack, pitr: RunPitr, lab_directory: Path) -> None:
    record(stack, pitr)
    live = pitr("drill", settings=drill_settings(stack, stack.cluster.data_directory))
    assert live.returncode == 10
    assert "is not empty" in live.stderr
    scratch = lab_directory / "scratch"
    settings = drill_settings(stack, scratch)
    assert pitr("restore", settings=settings).returncode == 0
    restored = pitr("drill", settings=settings)
    assert restored.returncode == 10
    assert "holds a restore that is no drill (hydrated)" in restored.stderr
    assert (scratch / "global" / "pg_control").exists()


def test_a_drill_does_not_replay_a_tablespace_into_the_files_of_the_server(
    stack: Stack, pitr: RunPitr, lab_directory: Path
) -> None:
    record(stack, pitr)
    spaces = lab_directory / "spaces"
    spaces.mkdir()
    hand_over(spaces)
    stack.cluster.execute(f"CREATE TABLESPACE side LOCATION '{spaces}'", "CREATE TABLE aside (x int) TABLESPACE side")
    # As long as all before took: the drill's moment, at 0.96 of the way, is after it.
    stack.cluster.execute("SELECT pg_sleep(extract(epoch FROM clock_timestamp() - min(at))) FROM committed")
    stack.cluster.execute("INSERT INTO aside VALUES (1)")
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    stack.cluster.stop()
    before = {path: path.stat().st_mtime_ns for path in spaces.rglob("*")}
    latest = pitr("drill", "--seed", "2", settings=drill_settings(stack, lab_directory / "scratch"))
    assert latest.returncode == 10, latest.stderr
    assert f"a tablespace in {spaces} was made after base backup" in latest.stderr
    assert {path: path.stat().st_mtime_ns for path in spaces.rglob("*")} == before


def test_what_a_drill_left_and_cannot_be_removed_is_named(pitr: RunPitr, lab_directory: Path) -> None:
    scratch, repository = lab_directory / "scratch", lab_directory / "repository"
    (scratch / "base" / "1").mkdir(parents=True)
    repository.mkdir()
    segment = "000000010000000000000002"
    marker = RestoreMarker(
        {"drill": "true"}, MarkerStage.PROMOTED, "base_x", 1, "", segment, segment, to_the_end=False,
        started_at=datetime.now(UTC),
    )  # fmt: skip
    write_marker(scratch, marker)
    hand_over(lab_directory)
    (scratch / "base").chmod(0o500)
    done = pitr("drill", settings={"WALG_FILE_PREFIX": str(repository), "PGDATA": str(scratch)})
    (scratch / "base").chmod(0o700)
    assert done.returncode == 51, done.stderr
    assert f"what a drill left in {scratch} cannot be removed" in done.stderr


def test_a_drill_that_restored_is_a_proof_though_what_it_left_cannot_be_removed(
    stack: Stack, pitr: RunPitr, lab_directory: Path
) -> None:
    record(stack, pitr)
    scratch = lab_directory / "scratch"
    hold = "COPY (SELECT 1) TO PROGRAM 'mkdir -p held/fast && chmod 500 held'"
    settings = {**drill_settings(stack, scratch), "PITR_VALIDATE_SQL": hold}
    done = pitr("drill", settings=settings)
    (scratch / "held").chmod(0o700)
    assert done.returncode == 51, done.stderr
    assert f"what a drill left in {scratch} cannot be removed" in done.stderr
    (backup,) = listed(stack, pitr)
    assert backup["drilled_at"] is not None
    assert backup["drill_failed_at"] is None
