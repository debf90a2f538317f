"""A base backup of the running agent: unasked for, joined, left alone, cancelled, and seen while it runs."""

import asyncio
import json
import signal
import subprocess
import time
from datetime import datetime
from typing import Any

from agent.lab.agent_process import AgentProcess, agent_environment, pitr_command, run_pitr
from agent.lab.processes import kill_tree
from agent.lab.seaweedfs import SeaweedServer
from tests.support.repository import read_keys
from tests.support.stack import BUCKET, MakeStack
from tests.support.until import until

SLOW = {"PITR_BACKUP_SCHEDULE": "0 0 1 1 *", "WALG_DISK_RATE_LIMIT": "128KiB"}  # minutes for one
QUICK = {"PITR_BACKUP_SCHEDULE": "", "WALG_DISK_RATE_LIMIT": "0"}


def finished_at(backup: dict[str, Any]) -> float:
    return datetime.fromisoformat(backup["finish_time"]).timestamp()


async def wait_for_metric(agent: AgentProcess, name: str, more_than: float) -> None:
    await until(lambda: agent.metric(name) > more_than, what=f"{name} above {more_than}")


def interrupt(agent: AgentProcess) -> tuple[int, str]:
    """Ask for a base backup and press Ctrl-C when it is followed; return the exit code, and what was said."""
    command = pitr_command("backup", "now")
    with subprocess.Popen(
        command, env=agent_environment(agent.settings), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as client:
        try:
            assert client.stderr is not None
            said = client.stderr.readline() + client.stderr.readline()
            client.send_signal(signal.SIGINT)
            return client.wait(60), said + client.stderr.read()
        finally:
            kill_tree(client)


def pitr(agent: AgentProcess, *arguments: str) -> str:
    done = run_pitr(*arguments, settings=agent.settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_status(agent: AgentProcess) -> Any:
    return json.loads(pitr(agent, "status", "--json"))


async def test_a_backup_that_nobody_asked_for_is_seen_joined_left_and_cancelled(
    make_stack: MakeStack, s3_server_of_its_own: SeaweedServer
) -> None:
    repository = s3_server_of_its_own.environment(BUCKET, "now")
    agent = (await asyncio.to_thread(make_stack, repository=repository, settings=SLOW)).agent
    await wait_for_metric(agent, "pitr_backup_done_bytes", 0)
    status = await asyncio.to_thread(read_status, agent)
    running = status["backups"]["running"]
    assert (running["why"], running["stage"]) == ("the repository holds none", "copying files")
    assert 0 < running["done_bytes"] < running["total_bytes"]
    assert 0 < running["ratio"] < 1
    assert agent.metric("pitr_backup_in_progress") == agent.metric('pitr_backup_stage{stage="copying files"}') == 1
    assert agent.metric("pitr_backup_total_bytes") == running["total_bytes"]
    assert "copying files: " in agent.get("/")[1]

    code, said = await asyncio.to_thread(interrupt, agent)
    assert (code, "already running" in said, "goes on in the agent" in said) == (130, True, True), said
    assert "copying files, " in said
    assert "running" in await asyncio.to_thread(pitr, agent, "backup", "list")
    assert await asyncio.to_thread(pitr, agent, "backup", "cancel") == "The base backup was cancelled.\n"

    assert [key for key in await read_keys(repository) if key.startswith("basebackups_005/")] == []
    assert agent.metric("pitr_backup_in_progress") == 0
    await wait_for_metric(agent, "pitr_backup_next_timestamp_seconds", time.time())
    assert "next: " in await asyncio.to_thread(pitr, agent, "backup", "list")
    assert await asyncio.to_thread(pitr, agent, "backup", "cancel") == "No base backup is running.\n"

    agent.settings.update(QUICK)
    await asyncio.to_thread(agent.restart)
    taken = json.loads(await asyncio.to_thread(pitr, agent, "backup", "now", "--full", "--permanent", "--json"))
    (listed,) = json.loads(await asyncio.to_thread(pitr, agent, "backup", "list", "--json"))
    assert (listed["name"], listed["kind"], listed["permanent"]) == (taken["backup"], "full", True)
    await wait_for_metric(agent, "pitr_backups_complete", 0)
    (newest,) = (await asyncio.to_thread(read_status, agent))["backups"]["newest"]
    assert newest["finish_time"] == listed["finish_time"]
    another = agent.settings | s3_server_of_its_own.environment(BUCKET, "another")
    elsewhere = await asyncio.to_thread(run_pitr, "backup", "list", settings=another)
    assert "holds no base backup" in elsewhere.stdout
    assert "newest" not in elsewhere.stdout, "they are not of that repository"
    assert agent.metric("postgres_base_backup_last_success_timestamp") > 1.7e9
    for known in ("pitr_window_from_timestamp_seconds", "pitr_verify_last_success_timestamp_seconds"):
        await wait_for_metric(agent, known, finished_at(newest) - 1)
    page = agent.get("/")[1]
    assert newest["name"] in page
    assert '<td data-label="Verified">' in page
    assert "All is well" in page
    await asyncio.to_thread(agent.restart)
    await wait_for_metric(agent, "postgres_base_backup_last_success_timestamp", 1.7e9)


async def test_an_agent_killed_in_the_middle_leaves_no_backup_and_the_next_one_is_whole(
    make_stack: MakeStack, s3_server_of_its_own: SeaweedServer
) -> None:
    repository = s3_server_of_its_own.environment(BUCKET, "killed")
    in_pieces = {**SLOW, "WALG_DISK_RATE_LIMIT": "1MiB", "WALG_TAR_SIZE_THRESHOLD": str(1 << 20)}
    agent = (await asyncio.to_thread(make_stack, repository=repository, settings=in_pieces)).agent

    async def stored() -> list[str]:
        return [key for key in await read_keys(repository) if key.startswith("basebackups_005/")]

    async with asyncio.timeout(60):
        while not await stored():  # noqa: ASYNC110 - nobody signals what a test may wait for
            await asyncio.sleep(0.1)
    agent.kill()
    left = {key.split("/")[1] for key in await stored()}
    agent.settings.update(QUICK)
    await asyncio.to_thread(agent.start)
    assert json.loads(await asyncio.to_thread(pitr, agent, "backup", "list", "--json")) == []
    taken = json.loads(await asyncio.to_thread(pitr, agent, "backup", "now", "--json"))["backup"]
    assert json.loads(await asyncio.to_thread(pitr, agent, "verify", "--deep", "--json"))["ok"]
    plan = json.loads(await asyncio.to_thread(pitr, agent, "expire", "--retention", "full=1", "--json"))
    assert [each["name"] for each in plan["backups"]] == [taken]
    assert [(each["name"], each["stays"]) for each in plan["incomplete_backups"]] == [(name, True) for name in left]
    assert {taken} != left
