"""What comes after a restore, and what goes on meanwhile."""

import asyncio
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent.domain.lsn import format_lsn
from agent.domain.restore_rates import TELLING_BYTES
from agent.domain.restore_target import format_time
from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from tests.support.agent_process import MakeAgent
from tests.support.past import read_records
from tests.support.stack import MakeStack, Stack

ROWS = "SELECT array_agg(i ORDER BY i) FROM t"


def restored(stack: Stack, directory: Path, **settings: str) -> PostgresCluster:
    """Restore into `directory` with replay and promotion; return the database cluster, not started."""
    bin_directory = stack.cluster.binaries["postgres"].parent
    done = run_pitr(
        "restore",
        settings={
            **stack.repository,
            "PGDATA": str(directory),
            "PITR_HOOK_DIR": str(stack.hooks),
            "PITR_POSTGRES_BIN": str(bin_directory),
            "AUTO_START": "true",
            **settings,
        },
    )
    assert done.returncode == 0, done.stderr
    return PostgresCluster(directory, stack.cluster.binaries)


def take_backup(settings: dict[str, str]) -> None:
    done = run_pitr("backup", "now", settings=settings)
    assert done.returncode == 0, done.stderr


def commit(cluster: PostgresCluster, row: int) -> datetime:
    """Insert a row; return a moment after it is committed."""
    cluster.execute(f"INSERT INTO t VALUES ({row})")
    return datetime.now(UTC)


async def test_a_restored_server_with_a_repository_of_its_own_can_be_restored_again(
    stack: Stack, make_agent: MakeAgent, lab_directory: Path
) -> None:
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    await asyncio.to_thread(take_backup, stack.agent.settings)
    commit(stack.cluster, 2)
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())

    second = await asyncio.to_thread(restored, stack, lab_directory / "second")
    own = {**stack.repository, "WALG_S3_PREFIX": stack.repository["WALG_S3_PREFIX"] + "-second"}
    agent = make_agent({**own, **second.client_environment}, name="second-agent")
    second.environment["PITR_SOCKET"] = str(agent.socket)
    await asyncio.to_thread(agent.start)
    try:
        await asyncio.to_thread(second.start)
        assert second.value(ROWS) == [1, 2]
        second.execute("ALTER SYSTEM RESET archive_mode")
        await asyncio.to_thread(second.restart)
        await asyncio.to_thread(take_backup, agent.settings)
        moment = commit(second, 3)
        commit(second, 4)
        await asyncio.to_thread(second.wait_until_archived, second.switch_wal())
        rows = {}
        for name, target in (("to-the-end", ""), ("to-a-time", moment.isoformat())):
            third = await asyncio.to_thread(restored, stack, lab_directory / name, **own, TARGET_TIME=target)
            with third:
                await asyncio.to_thread(third.start)
                rows[name] = third.value(ROWS)
        assert rows == {"to-the-end": [1, 2, 3, 4], "to-a-time": [1, 2, 3]}
    finally:
        second.kill()


def write_at_random(cluster: PostgresCluster, table: str, size: int) -> None:
    """Write so many bytes that nothing compresses."""
    with cluster.connect() as session:
        session.execute(f"CREATE TABLE {table} (content bytea STORAGE EXTERNAL)")
        with session.cursor().copy(f"COPY {table} FROM STDIN (FORMAT binary)") as rows:
            rows.set_types(["bytea"])
            for _ in range(size >> 20):
                rows.write_row([os.urandom(1 << 20)])


def asked(stack: Stack, *arguments: str, **settings: str) -> dict[str, Any]:
    done = run_pitr("restore", "--json", *arguments, settings={**stack.repository, **settings})
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_plan_tells_how_long_the_restore_before_it_took(
    make_stack: MakeStack, s3_environment: dict[str, str], lab_directory: Path
) -> None:
    stack = make_stack(repository=s3_environment, segment_megabytes=16)
    write_at_random(stack.cluster, "before", TELLING_BYTES)
    take_backup(stack.agent.settings)
    write_at_random(stack.cluster, "after", TELLING_BYTES)
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    assumed = asked(stack, "--plan")
    assert (assumed["hydrate_seconds"], assumed["replay_measured_at"]) == (None, None)
    where = {"PGDATA": str(lab_directory / "restored"), "PITR_HOOK_DIR": str(stack.hooks), "AUTO_START": "true"}
    took = asked(stack, **where, PITR_POSTGRES_BIN=str(stack.cluster.binaries.directory))
    told = asked(stack, "--plan")
    assert told["hydrate_seconds"] == pytest.approx(took["seconds"]["hydrating"], abs=0.1)
    assert told["replay_seconds"] == pytest.approx(took["seconds"]["replaying"], abs=0.1)
    assert told["replay_measured_at"] is not None


def test_the_transaction_right_at_an_inclusive_lsn_is_told_as_the_last_one(stack: Stack, lab_directory: Path) -> None:
    stack.keep_copies()
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    take_backup(stack.agent.settings)
    for row in (2, 3):
        commit(stack.cluster, row)
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    segments = sorted(path for path in stack.copies.iterdir() if len(path.name) == 24)
    ended = [record for record in read_records(stack.cluster.binaries, segments) if record.ends is not None]
    where = {"PGDATA": str(lab_directory / "restored"), "PITR_HOOK_DIR": str(stack.hooks), "AUTO_START": "true"}
    binaries = str(stack.cluster.binaries.directory)
    told = asked(stack, **where, PITR_POSTGRES_BIN=binaries, TARGET_LSN=format_lsn(ended[-2].lsn))
    assert ended[-2].time is not None
    assert told["last_commit_at"] == format_time(ended[-2].time)
    with PostgresCluster(lab_directory / "restored", stack.cluster.binaries) as cluster:
        cluster.start()
        assert cluster.value(ROWS) == [1, 2]


async def test_what_is_archived_after_the_plan_is_not_replayed_beyond_an_idle_moment(
    stack: Stack, lab_directory: Path
) -> None:
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    await asyncio.to_thread(take_backup, stack.agent.settings)
    moment = commit(stack.cluster, 2)
    stack.cluster.execute("SELECT pg_sleep(1.1)", "CHECKPOINT")  # a checkpoint's time is in whole seconds
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())
    directory = lab_directory / "restored"
    target = {"TARGET_TIME": moment.isoformat()}
    await asyncio.to_thread(lambda: restored(stack, directory, AUTO_START="false", **target))

    commit(stack.cluster, 99)
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())
    cluster = await asyncio.to_thread(lambda: restored(stack, directory, **target))
    with cluster:
        await asyncio.to_thread(cluster.start)
        assert cluster.value(ROWS) == [1, 2]
