"""The running agent expires what PITR_RETENTION does not keep; commands look at the catalog, pin and delete."""

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.s3 import BUCKET
from tests.support.stack import MakeStack, Stack
from tests.support.until import next_second


@pytest.fixture
def expiring_stack(make_stack: MakeStack, s3_server: SeaweedServer) -> Stack:
    """A running stack whose agent keeps one full backup, and takes none by itself."""
    repository = s3_server.environment(BUCKET, f"test-{uuid.uuid4().hex[:8]}")
    return make_stack(repository=repository, settings={"PITR_RETENTION": "full=1", "PITR_BACKUP_SCHEDULE": ""})


def pitr(stack: Stack, *arguments: str, code: int = 0) -> Any:
    done = run_pitr(*arguments, "--json", settings=stack.agent.settings)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


async def test_the_agent_expires_after_a_backup_and_pinned_ones_stay(expiring_stack: Stack) -> None:
    await asyncio.to_thread(story, expiring_stack)


def story(stack: Stack) -> None:
    first = pitr(stack, "backup", "now", "--full")["backup"]
    assert pitr(stack, "backup", "pin", first) == {"pinned": [first]}
    second = pitr(stack, "backup", "now", "--full")["backup"]
    next_second()
    third = pitr(stack, "backup", "now", "--full")["backup"]
    wait_until(lambda: names(stack) == [first, third], seconds=120, what="the second base backup to expire")
    assert "there is no base backup" in pitr(stack, "backup", "show", second, code=10)
    shown = pitr(stack, "backup", "show", first)
    assert (shown["permanent"], shown["children"]) == (True, [])
    assert pitr(stack, "backup", "show", "LATEST")["name"] == third
    assert shown["objects"] > 3

    assert pitr(stack, "backup", "unpin", first) == {"unpinned": [first]}
    plan = pitr(stack, "expire")
    assert [(backup["name"], backup["stays"]) for backup in plan["backups"]] == [(first, False), (third, True)]
    assert plan["removes_bytes"] > 0
    assert plan["removed"] is None
    assert names(stack) == [first, third]
    done = pitr(stack, "expire", "--retention", "full=1", "--confirm")
    assert done["removed"]["backup_bytes"] + done["removed"]["wal_bytes"] == plan["removes_bytes"]
    assert done["removed"]["failed"] == []
    assert names(stack) == [third]
    for word in ("expire", "backup show " + third):
        people = run_pitr(*word.split(), settings=stack.agent.settings)
        assert people.returncode == 0, people.stderr
        assert third in people.stdout
    verified = pitr(stack, "verify")
    assert (verified["ok"], verified["gaps"]) == (True, [])
    assert verified["backups"] == [{"name": third, "ok": True, "problems": []}]
    plan = pitr(stack, "restore", "--plan")
    assert (plan["reachable"], plan["backup"]) == (True, third)
    assert "no retention is set" in run_pitr("expire", settings={**stack.agent.settings, "PITR_RETENTION": ""}).stderr


def names(stack: Stack) -> list[str]:
    return [backup["name"] for backup in pitr(stack, "backup", "list")]


async def test_after_damage_on_the_volume_the_last_good_backup_stays_and_is_what_is_restored(
    make_stack: MakeStack, s3_server: SeaweedServer, lab_directory: Path
) -> None:
    repository = s3_server.environment(BUCKET, f"test-{uuid.uuid4().hex[:8]}")
    stack = await asyncio.to_thread(make_stack, repository=repository, settings={"PITR_BACKUP_SCHEDULE": ""})
    await asyncio.to_thread(damage_story, stack, lab_directory / "restored")


def damage_story(stack: Stack, directory: Path) -> None:
    stack.cluster.execute("CREATE TABLE cold AS SELECT generate_series(1, 9999) AS id", "CHECKPOINT")
    good = pitr(stack, "backup", "now")["backup"]
    with (stack.cluster.data_directory / stack.cluster.value("SELECT pg_relation_filepath('cold')")).open(
        "r+b"
    ) as file:
        file.seek(3 * 8192 + 5000)
        file.write(b"\x55")
    said = run_pitr("backup", "now", settings=stack.agent.settings).stdout
    assert "corrupt pages in the database: 1; the agent's log" in " ".join(said.split())
    next_second()
    newest = pitr(stack, "backup", "now")
    assert (
        [each["corrupt_pages"] for each in pitr(stack, "backup", "list")]
        == [0, 1, newest["corrupt_pages"]]
        == [0, 1, 1]
    )
    wait_until(lambda: stack.agent.metric("pitr_backup_corrupt_pages") == 1, seconds=60, what="the metric")
    assert "PitrBackupCorruptPages" in stack.agent.get("/")[1]
    stays = {
        each["name"]: each["stays"] for each in pitr(stack, "expire", "--retention", "full=1", "--confirm")["backups"]
    }
    assert list(stays.values()) == [True, False, True]
    assert names(stack) == [good, newest["backup"]]

    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    settings = {
        **stack.repository, "PGDATA": str(directory), "PITR_HOOK_DIR": str(stack.hooks), "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries["postgres"].parent),
    }  # fmt: skip
    done = run_pitr("restore", settings=settings)
    assert done.returncode == 0, done.stderr
    assert f"{newest['backup']} is not used: it has 1 corrupt pages" in " ".join(done.stdout.split())
    with PostgresCluster(directory, stack.cluster.binaries) as restored:
        restored.start()
        assert restored.value("SELECT count(*) FROM cold") == 9999
