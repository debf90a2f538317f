"""Volumes that are full: WAL that cannot leave, and WAL that cannot come."""

import asyncio
from contextlib import suppress
from pathlib import Path

import psycopg

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.ledger import Ledger
from tests.support.small_volume import MIB, SmallVolume
from tests.support.stack import MakeStack, Stack

SECONDS = 90


def use_up(cluster: PostgresCluster) -> None:
    """Write WAL until the server has died of it."""
    with suppress(psycopg.Error), cluster.connect() as session:
        while True:
            session.execute("SELECT pg_logical_emit_message(true, 'test', repeat('x', 1000000))")


def keep_little_wal(cluster: PostgresCluster) -> None:
    """Let the server keep no WAL but what is not archived."""
    cluster.execute(
        "ALTER SYSTEM SET min_wal_size = '2MB'", "ALTER SYSTEM SET max_wal_size = '8MB'", "SELECT pg_reload_conf()"
    )


def restored(stack: Stack, directory: Path, **settings: str) -> PostgresCluster:
    """Restore into `directory`; return the database cluster, not started."""
    binaries = stack.cluster.binaries
    done = run_pitr(
        "restore",
        settings={
            **stack.repository,
            "PGDATA": str(directory),
            "PITR_HOOK_DIR": str(stack.hooks),
            "PITR_POSTGRES_BIN": str(binaries["postgres"].parent),
            **settings,
        },
    )
    assert done.returncode == 0, done.stderr
    return PostgresCluster(directory, binaries)


async def test_a_server_whose_wal_volume_filled_up_in_an_outage_has_lost_nothing_when_it_has_grown(
    make_stack: MakeStack,
    s3_environment: dict[str, str],
    s3_server: SeaweedServer,
    small_volume: SmallVolume,
    lab_directory: Path,
    tmp_path: Path,
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        repository = {**s3_environment, "AWS_ENDPOINT": proxy.endpoint}
        stack = await asyncio.to_thread(make_stack, repository=repository, wal_volume=small_volume)
        cluster, agent = stack.cluster, stack.agent
        keep_little_wal(cluster)
        taken = await asyncio.to_thread(run_pitr, "backup", "now", settings=agent.settings)
        assert taken.returncode == 0, taken.stderr
        with Ledger(cluster, tmp_path / "ledger") as ledger:
            proxy.add(Fault(status=503, code="SlowDown", times=1_000_000))
            await asyncio.to_thread(use_up, cluster)
            assert "No space left on device" in cluster.log_text()
            await asyncio.to_thread(
                wait_until,
                lambda: agent.metric("pitr_archive_backlog_bytes") > 20 * MIB,
                seconds=SECONDS,
                what="the backlog to show in the metrics",
            )
            cluster.kill()
            small_volume.grow(80 * MIB)
            proxy.clear()
            await asyncio.to_thread(cluster.start)
            await asyncio.to_thread(ledger.wait_for, 50, seconds=SECONDS)
        await asyncio.to_thread(cluster.wait_until_archived, cluster.switch_wal(), seconds=SECONDS)
        assert agent.metric("pitr_archive_backlog_bytes") < 10 * MIB
        with await asyncio.to_thread(restored, stack, lab_directory / "restored", AUTO_START="true") as copy:
            await asyncio.to_thread(copy.start)
            ledger.require_all_in(copy)


async def test_recovery_on_a_full_wal_volume_waits_for_room_and_goes_on(
    stack: Stack, make_agent: MakeAgent, small_volume: SmallVolume, lab_directory: Path
) -> None:
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    taken = await asyncio.to_thread(run_pitr, "backup", "now", settings=stack.agent.settings)
    assert taken.returncode == 0, taken.stderr
    for row in range(2, 7):
        stack.cluster.execute(f"INSERT INTO t VALUES ({row})")
        await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())
    directory = lab_directory / "copy"
    await asyncio.to_thread(restored, stack, directory)
    agent = make_agent({**stack.repository, "PGDATA": str(directory)}, name="copy-agent")
    environment = {"PITR_SOCKET": str(agent.socket)}
    with PostgresCluster(directory, stack.cluster.binaries, environment=environment) as copy:
        small_volume.move_wal_here(copy)
        small_volume.fill(leave=MIB // 2)
        await asyncio.to_thread(agent.start)
        await asyncio.to_thread(copy.start, wait=False)
        await asyncio.to_thread(
            wait_until, lambda: "No space left on device" in agent.log_text(), seconds=SECONDS, what="the refusal"
        )
        assert copy.pid is not None
        small_volume.empty()
        await asyncio.to_thread(
            wait_until, lambda: "database system is ready" in copy.log_text(), seconds=SECONDS, what="recovery"
        )
        assert copy.value("SELECT array_agg(i ORDER BY i) FROM t") == [1, 2, 3, 4, 5, 6]
