"""The agent outlives PostgreSQL: what it does with the WAL that is left when it is told to end."""

import asyncio
import signal
import subprocess
from typing import Any

import pytest

from agent.lab.agent_process import AgentProcess
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.agent_process import RunPitr
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.repository import read_wal
from tests.support.stack import MakeStack, Stack


def ready(stack: Stack) -> set[str]:
    """What PostgreSQL has not been told to be archived."""
    status = stack.cluster.data_directory / "pg_wal" / "archive_status"
    return {path.stem for path in status.glob("*.ready")}


def archive_status(stack: Stack) -> dict[str, tuple[int, int]]:
    """The directory and its files, each with the times of its last change: whatever is done to one moves them."""
    directory = stack.cluster.data_directory / "pg_wal" / "archive_status"
    found = {path.name: path.lstat() for path in (directory, *directory.iterdir())}
    return {name: (status.st_mtime_ns, status.st_ctime_ns) for name, status in found.items()}


def last_event(agent: AgentProcess, event: str) -> dict[str, Any]:
    return [line for line in agent.log_lines() if line["event"] == event][-1]


def wait_for_event(agent: AgentProcess, event: str) -> None:
    """Return when the agent that runs has logged `event`; what those before it logged does not count."""

    def logged() -> bool:
        events = [line["event"] for line in agent.log_lines()]
        return event in events[::-1][: events[::-1].index("agent started")]

    wait_until(logged, seconds=60, what=repr(event))


def end(agent: AgentProcess) -> int:
    agent.signal(signal.SIGTERM)
    return agent.wait()


async def test_wal_that_a_stopped_server_left_behind_is_archived_before_the_agent_ends(
    stack: Stack, s3_server_of_its_own: SeaweedServer
) -> None:
    s3_server_of_its_own.stop()
    stack.cluster.execute("CREATE TABLE t AS SELECT generate_series(1, 1000)")
    segment = stack.cluster.switch_wal()
    await asyncio.to_thread(stack.cluster.stop)
    left = ready(stack)
    assert segment in left
    untouched = archive_status(stack)
    backlog_bytes = sum((stack.cluster.data_directory / "pg_wal" / name).stat().st_size for name in left)

    stack.agent.settings["PITR_DRAIN_TIMEOUT"] = "2"
    stack.agent.stop()
    await asyncio.to_thread(stack.agent.start)
    assert await asyncio.to_thread(end, stack.agent) == 32
    given_up = last_event(stack.agent, "drain given up")
    assert (given_up["backlog_files"], given_up["backlog_first"]) == (len(left), sorted(left))
    assert f"{len(left)} WAL files are not archived, from {min(left)} on" in stack.agent.log_text()

    del stack.agent.settings["PITR_DRAIN_TIMEOUT"]
    await asyncio.to_thread(stack.agent.start)
    stack.agent.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_for_event, stack.agent, "drain started")
    assert await asyncio.to_thread(end, stack.agent) == 0, "a second SIGTERM ends it at once"

    await asyncio.to_thread(stack.agent.start)
    stack.agent.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_for_event, stack.agent, "drain started")
    assert stack.agent.is_ready()
    expected = {"pitr_archive_backlog_files": len(left), "pitr_archive_backlog_bytes": backlog_bytes}
    await asyncio.to_thread(
        wait_until,
        lambda: all(stack.agent.metric(name) == value for name, value in expected.items()),
        seconds=60,
        what="the backlog to show in the metrics",
    )
    assert stack.agent.metric("pitr_wal_volume_free_bytes") > 0
    s3_server_of_its_own.start()
    assert await asyncio.to_thread(stack.agent.wait) == 0
    drained = last_event(stack.agent, "drained")
    assert (drained["files"], drained["backlog_files"]) == (len(left), 0)
    assert drained["bytes"] == backlog_bytes
    assert left <= set(await read_wal(stack.agent.settings))
    assert archive_status(stack) == untouched, "archive_status is PostgreSQL's alone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_an_agent_told_to_end_together_with_postgresql_serves_its_last_archive_commands(
    stack: Stack, number: int
) -> None:
    stack.cluster.execute("CREATE TABLE t AS SELECT generate_series(1, 1000)")
    stack.agent.signal(number)
    await asyncio.to_thread(stack.cluster.stop)
    assert await asyncio.to_thread(stack.agent.wait) == 0
    assert last_event(stack.agent, "drained")["files"] >= 1
    assert ready(stack) == set()
    done = {path.stem for path in (stack.cluster.data_directory / "pg_wal" / "archive_status").glob("*.done")}
    assert done <= set(await read_wal(stack.agent.settings))


async def test_the_postmaster_pid_of_a_killed_server_does_not_end_the_agent_early(
    stack: Stack, s3_server_of_its_own: SeaweedServer
) -> None:
    s3_server_of_its_own.stop()
    segment = stack.cluster.switch_wal()
    stack.cluster.kill()
    assert (stack.cluster.data_directory / "postmaster.pid").exists()
    stack.agent.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_for_event, stack.agent, "drain started")
    s3_server_of_its_own.start()
    assert await asyncio.to_thread(stack.agent.wait) == 0
    assert last_event(stack.agent, "drained")["backlog_files"] == 0
    assert segment in await read_wal(stack.agent.settings)


async def test_a_base_backup_does_not_hold_up_a_smart_shutdown(
    make_stack: MakeStack, s3_environment: dict[str, str], s3_server: SeaweedServer, pitr: RunPitr
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        proxy.add(Fault(method="PUT", path="tar_partitions", times=1000, delay_seconds=300))
        stack = await asyncio.to_thread(make_stack, repository={**s3_environment, "AWS_ENDPOINT": proxy.endpoint})
        backup = asyncio.create_task(asyncio.to_thread(pitr, "backup", "now", settings=stack.agent.settings))
        await asyncio.to_thread(
            wait_until,
            lambda: "tar_partitions" in str(proxy.requests),
            seconds=60,
            what="the base backup to be under way",
        )
        await asyncio.to_thread(stack.cluster.stop, "smart")
        done: subprocess.CompletedProcess[str] = await backup
    assert done.returncode == 50, done.stdout + done.stderr
    assert "PostgreSQL is stopping" in done.stderr
