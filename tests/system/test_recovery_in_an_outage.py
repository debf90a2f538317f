"""What PostgreSQL makes of the hook while the store is away in a recovery, on a standby, and in a promotion."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import psutil
import psycopg
import pytest

from agent.lab.agent_process import AgentProcess, run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.stack import MakeStack, Stack

SECONDS = 60
ROWS = "SELECT array_agg(i ORDER BY i) FROM t"
AWAY = {
    "unavailable": Fault(status=503, code="SlowDown", times=1_000_000),
    "forbidden": Fault(status=403, code="AccessDenied", times=1_000_000),
    "silent": Fault(black_hole=True, times=1_000_000),
}


@dataclass
class Copy:
    """A hydrated copy of the primary, not started, with an agent of its own behind a proxy."""

    primary: Stack
    cluster: PostgresCluster
    agent: AgentProcess
    proxy: FaultProxy

    def become_standby(self) -> None:
        """Let it follow the archive, and its primary while there is one."""
        directory = self.cluster.data_directory
        (directory / "recovery.signal").rename(directory / "standby.signal")
        with (directory / "postgresql.auto.conf").open("a") as file:
            file.write(f"hot_standby = on\nprimary_conninfo = '{self.primary.cluster.conninfo}'\n")
            file.write("wal_retrieve_retry_interval = '100ms'\n")

    def is_open(self) -> bool:
        """Tell whether recovery has ended and clients are served."""
        with suppress(psycopg.OperationalError):
            return self.cluster.value("SELECT NOT pg_is_in_recovery()") is True
        return False

    async def gets(self, last: int, how: str) -> None:
        """Wait until the rows from 1 to `last` can be read."""
        await asyncio.to_thread(wait_until, lambda: self._has(last), seconds=SECONDS, what=f"row {last} to be {how}")

    def _has(self, last: int) -> bool:
        with suppress(psycopg.Error):
            return bool(self.cluster.value(ROWS) == list(range(1, last + 1)))
        return False

    def hook_waits(self, seconds: float) -> bool:
        """Tell whether a restore_command of this server has been running for so long."""
        assert self.cluster.pid is not None
        now = time.time()
        for process in psutil.Process(self.cluster.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "pitr-hook" in process.name() and now - process.create_time() > seconds:
                    return True
        return False


def commit(cluster: PostgresCluster, row: int) -> str:
    """Commit a row; return the segment that holds it, once it is archived."""
    cluster.execute(f"INSERT INTO t VALUES ({row})")
    segment = cluster.switch_wal()
    cluster.wait_until_archived(segment)
    return segment


@pytest.fixture
async def copy(
    make_stack: MakeStack, make_agent: MakeAgent, s3_server: SeaweedServer, s3_environment: dict[str, str],
    lab_directory: Path,
) -> AsyncIterator[Copy]:  # fmt: skip
    """A copy of a primary that holds row 1, made before row 2 was committed."""
    async with AsyncExitStack() as resources:
        proxy = await resources.enter_async_context(FaultProxy(s3_server.endpoint))
        primary = await asyncio.to_thread(make_stack, repository=s3_environment)
        primary.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
        taken = await asyncio.to_thread(run_pitr, "backup", "now", settings=primary.agent.settings)
        assert taken.returncode == 0, taken.stderr
        directory = lab_directory / "copy"
        settings = {**s3_environment, "PGDATA": str(directory), "AWS_ENDPOINT": proxy.endpoint}
        binaries = primary.cluster.binaries
        hydrated = await asyncio.to_thread(
            run_pitr,
            "restore",
            settings={
                **settings,
                "PITR_HOOK_DIR": str(primary.hooks),
                "PITR_POSTGRES_BIN": str(binaries["postgres"].parent),
            },
        )
        assert hydrated.returncode == 0, hydrated.stderr
        agent = make_agent(settings, name="copy-agent")
        await asyncio.to_thread(agent.start)
        cluster = resources.enter_context(
            PostgresCluster(directory, binaries, environment={"PITR_SOCKET": str(agent.socket)})
        )
        await asyncio.to_thread(commit, primary.cluster, 2)
        yield Copy(primary, cluster, agent, proxy)


async def stops_without_opening(copy: Copy) -> None:
    """Start the copy and see its recovery given up, nothing promoted."""
    await asyncio.to_thread(copy.cluster.start, wait=False)
    assert await asyncio.to_thread(copy.cluster.wait_until_ended, seconds=SECONDS) != 0
    assert "selected new timeline" not in copy.cluster.log_text()
    assert (copy.cluster.data_directory / "recovery.signal").exists()


def says_what_recovery_waits_for(copy: Copy) -> None:
    """Read the status of the copy's agent while nothing has answered recovery."""
    said = run_pitr("status", "--json", settings=copy.agent.settings)
    awaited = json.loads(said.stdout)["wal"]["awaited"]
    assert copy.agent.metric("pitr_fetch_awaited_since_timestamp_seconds") > 0
    text = run_pitr("status", settings=copy.agent.settings).stdout
    assert f"for {awaited['name']} since" in " ".join(text.split())
    assert awaited["attempts"] >= 1


async def test_recovery_that_lacks_its_store_or_a_segment_stops_and_never_opens_the_server(
    copy: Copy, s3_server: SeaweedServer, s3_environment: dict[str, str]
) -> None:
    copy.cluster.environment["PITR_HOOK_TIMEOUT"] = "2"
    for fault in AWAY.values():
        copy.proxy.add(replace(fault))
        await stops_without_opening(copy)
        await asyncio.to_thread(says_what_recovery_waits_for, copy)
        copy.proxy.clear()
        await copy.proxy.cut()

    segments = [await asyncio.to_thread(commit, copy.primary.cluster, row) for row in (3, 4, 5)]
    bucket, _, prefix = s3_environment["WALG_S3_PREFIX"].removeprefix("s3://").partition("/")
    client = boto3.client(
        "s3", endpoint_url=s3_server.endpoint, region_name="us-east-1", aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
    )  # fmt: skip
    hole = {"Bucket": bucket, "Key": f"{prefix}/wal_005/{segments[0]}.zst"}
    content = client.get_object(**hole)["Body"].read()
    client.delete_object(**hole)
    copy.cluster.environment["PITR_HOOK_TIMEOUT"] = "10"
    await stops_without_opening(copy)
    assert f'WAL segment "{segments[0]}" is missing' in copy.cluster.log_text()
    asked = [path for _, path in copy.proxy.requests if segments[0] in path]
    assert len(asked) <= 15, "in 10 seconds: 3 for each of 2 or 3 looks"
    assert copy.agent.log_text().count(f'"{segments[0]}\\" is missing from the archive') <= 2

    client.put_object(**hole, Body=content)
    del copy.cluster.environment["PITR_HOOK_TIMEOUT"]
    await asyncio.to_thread(copy.cluster.start, wait=False)
    await asyncio.to_thread(wait_until, copy.is_open, seconds=SECONDS, what="the end of recovery")
    assert copy.agent.metric("pitr_fetch_awaited_since_timestamp_seconds") == 0
    assert copy.cluster.value(ROWS) == [1, 2, 3, 4, 5], "at the end of the WAL a missing segment ends recovery"


async def test_a_standby_streams_in_an_outage_and_promoted_in_one_waits_for_what_the_store_holds(copy: Copy) -> None:
    copy.become_standby()
    for row, fault in enumerate(AWAY.values(), 3):
        copy.primary.cluster.execute(f"INSERT INTO t VALUES ({row})")
        copy.proxy.add(replace(fault))
        await asyncio.to_thread(copy.cluster.start, wait=False)
        await copy.gets(row, "streamed")
        assert copy.cluster.value("SELECT pg_is_in_recovery()") is True
        await asyncio.to_thread(copy.cluster.stop)
        copy.proxy.clear()
        await copy.proxy.cut()

    copy.primary.cluster.execute("ALTER SYSTEM SET max_wal_senders = 0")  # from now on it has only the archive
    await asyncio.to_thread(copy.primary.cluster.restart)
    await asyncio.to_thread(copy.cluster.start, wait=False)
    await asyncio.to_thread(commit, copy.primary.cluster, 6)
    await copy.gets(6, "replayed")
    copy.proxy.add(replace(AWAY["unavailable"]))
    await asyncio.to_thread(commit, copy.primary.cluster, 7)
    copy.primary.cluster.kill()
    copy.cluster.execute("SELECT pg_promote(wait => false)")
    await asyncio.to_thread(
        wait_until, lambda: copy.hook_waits(6), seconds=SECONDS, what="the hook to wait longer than a standby's"
    )
    assert copy.cluster.value("SELECT pg_is_in_recovery()") is True
    copy.proxy.clear()
    await asyncio.to_thread(wait_until, copy.is_open, seconds=SECONDS, what="the promotion")
    assert copy.cluster.value(ROWS) == [1, 2, 3, 4, 5, 6, 7]
