"""Bad input as a person meets it: one line that names the thing and the next step, and its exit code."""

import asyncio
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import agent
from agent.lab.agent_process import run_pitr
from agent.lab.privileges import hand_over, make_directory
from agent.lab.seaweedfs import SeaweedServer, free_ports
from tests.support.stack import BUCKET, Stack

SECRET = "c4n4ry-s3cr3t"


def refused(*arguments: str, settings: Mapping[str, str], code: int) -> str:
    """Run `pitr`, require `code` and one line that ends in a next step; return the line."""
    done = run_pitr(*arguments, settings=settings, seconds=60)
    assert done.returncode == code, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pitr: ")
    assert lines[0].endswith("."), "there is no next step"
    assert SECRET not in done.stdout + done.stderr
    return lines[0]


@pytest.fixture
def s3(s3_server_of_its_own: SeaweedServer) -> Mapping[str, str]:
    return s3_server_of_its_own.environment(BUCKET, "bad-input")


@pytest.mark.parametrize("command", [("backup", "list"), ("restore", "--plan"), ("restore",)])
def test_a_repository_that_cannot_be_used_is_told_apart_by_its_exit_code(
    s3: Mapping[str, str], command: tuple[str, ...], lab_directory: Path
) -> None:
    settings = {**s3, "PGDATA": str(lab_directory / "empty")}
    bucket = {**settings, "WALG_S3_PREFIX": "s3://no-such-bucket/x"}
    assert "no-such-bucket" in refused(*command, settings=bucket, code=21)
    key = {**settings, "AWS_SECRET_ACCESS_KEY": SECRET}
    assert "AWS_SECRET_ACCESS_KEY" in refused(*command, settings=key, code=21)
    nobody = {**settings, "AWS_ACCESS_KEY_ID": "nobody"}
    assert "AWS_ACCESS_KEY_ID" in refused(*command, settings=nobody, code=21)
    assert not (lab_directory / "empty").exists()


def test_an_unreachable_endpoint_is_told_within_a_minute(s3: Mapping[str, str]) -> None:
    settings = {**s3, "AWS_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}"}
    assert "AWS_ENDPOINT" in refused("backup", "list", settings=settings, code=20)


def test_settings_that_are_missing_or_wrong_are_named(s3: Mapping[str, str], lab_directory: Path) -> None:
    assert "PGDATA" in refused("agent", settings=s3, code=10)
    assert "PGDATA" in refused("restore", settings=s3, code=10)
    absent = {**s3, "PGDATA": "/no/such/volume/data"}
    assert "/no/such/volume" in refused("agent", settings=absent, code=10)
    loop = lab_directory / "loop"
    loop.symlink_to(loop)
    assert f"PGDATA={loop} cannot be read" in refused("agent", settings={**s3, "PGDATA": str(loop)}, code=10)
    assert "WALG_S3_PREFIX" in refused("backup", "list", settings={}, code=10)
    assert "time zone" in refused("restore", settings={**s3, "TARGET_TIME": "2026-11-22T19:53:41"}, code=10)
    socket = {**s3, "PITR_SOCKET": str(lab_directory / "agent.sock")}
    assert "no agent" in refused("backup", "now", settings=socket, code=12)


def test_a_library_that_is_missing_is_told_in_a_line(s3: Mapping[str, str], lab_directory: Path) -> None:
    (lab_directory / "lz4.py").write_text("import not_there")
    settings = {**s3, "PYTHONPATH": f"{lab_directory}:{Path(agent.__file__).parents[1]}"}
    told = refused("window", settings=settings, code=10)
    assert "the Python package not_there cannot be imported" in told


def test_a_directory_that_is_not_empty_is_not_restored_into(stack: Stack, lab_directory: Path) -> None:
    take_backup(stack)
    full = lab_directory / "full"
    make_directory(full)
    (full / "somebodys.file").write_text("precious")
    hand_over(full)
    settings = {**stack.repository, "PGDATA": str(full)}
    assert str(full) in refused("restore", settings=settings, code=10)
    assert [path.name for path in full.iterdir()] == ["somebodys.file"]


def take_backup(stack: Stack) -> None:
    done = run_pitr("backup", "now", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr


async def test_a_target_that_cannot_be_reached_is_refused_before_anything_is_written(
    stack: Stack, lab_directory: Path
) -> None:
    stack.cluster.execute("CREATE TABLE before_the_backup ()")
    await asyncio.to_thread(take_backup, stack)
    stack.cluster.execute("CREATE TABLE after_the_backup ()")
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())
    now = datetime.now(UTC)
    data = lab_directory / "restored"
    settings = {**stack.repository, "PGDATA": str(data), "AUTO_START": "true"}
    for moment in (now - timedelta(days=1), now + timedelta(hours=1)):
        target = {**settings, "TARGET_TIME": moment.isoformat()}
        for command in (("restore",), ("restore", "--plan")):
            line = await asyncio.to_thread(refused, *command, settings=target, code=40)
            assert moment.strftime("%Y-%m-%dT%H:%M:%S") in line
            assert now.strftime("%Y-%m-%d") in line.split(". ", 1)[1], "it does not say what can be reached"
    assert not data.exists() or not any(data.iterdir())


def test_usage_errors_exit_with_2(s3: Mapping[str, str]) -> None:
    done: subprocess.CompletedProcess[str] = run_pitr("backup", "yesterday", settings=s3)
    assert done.returncode == 2
