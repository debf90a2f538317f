"""WAL that PostgreSQL takes for archived, and that is not: found, closed as far as pg_wal goes, and told."""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.domain.wal import segment_position
from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent, RunPitr
from tests.support.repository import read_wal
from tests.support.stack import Stack

MIB = 1 << 20
FILLED, MISSING = "wal gap filled from pg_wal", "wal segments missing"


def events(agent: AgentProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in agent.log_lines() if line["event"] == event]


def wait_for_event(agent: AgentProcess, event: str) -> dict[str, Any]:
    wait_until(lambda: events(agent, event), seconds=60, what=event)
    return events(agent, event)[-1]


def fill_segments(cluster: PostgresCluster, count: int) -> list[str]:
    """Finish `count` segments; return their names."""
    return [fill_segment(cluster, number) for number in range(count)]


def fill_segment(cluster: PostgresCluster, number: int) -> str:
    cluster.execute(f"SELECT pg_logical_emit_message(false, 'test', 'segment {number}')")
    return cluster.switch_wal()


def forgery(stack: Stack) -> Path:
    """While this file exists, archive_command claims success without calling the hook."""
    return stack.copies / "forge"


def prepare_forgery(stack: Stack) -> None:
    hook = stack.cluster.value("SHOW archive_command")
    command = f"test -e {forgery(stack)} || {hook}"
    stack.cluster.execute(f"ALTER SYSTEM SET archive_command = '{command}'", "SELECT pg_reload_conf()")


def archive_only_in_name(stack: Stack, count: int) -> list[str]:
    """While no agent runs, let PostgreSQL mark `count` segments done that nobody archived; return their names."""
    stack.agent.kill()
    forgery(stack).touch()
    names = fill_segments(stack.cluster, count)
    stack.cluster.wait_until_archived(names[-1])
    forgery(stack).unlink()
    return names


def pg_wal(cluster: PostgresCluster) -> set[str]:
    return {path.name for path in (cluster.data_directory / "pg_wal").iterdir()}


def forget(cluster: PostgresCluster, names: Iterable[str]) -> None:
    """Let PostgreSQL recycle segments that it takes for archived."""

    def is_forgotten() -> bool:
        cluster.execute("CHECKPOINT")
        return not pg_wal(cluster) & set(names)

    wait_until(is_forgotten, seconds=60, what="pg_wal to be tidied")


async def test_forged_archive_status_is_found_out(stack: Stack, pitr: RunPitr) -> None:
    cluster, agent = stack.cluster, stack.agent
    prepare_forgery(stack)
    (before,) = await asyncio.to_thread(fill_segments, cluster, 1)
    await asyncio.to_thread(cluster.wait_until_archived, before)

    forged = await asyncio.to_thread(archive_only_in_name, stack, 3)
    (after,) = await asyncio.to_thread(fill_segments, cluster, 1)
    await asyncio.to_thread(agent.start)
    found = await asyncio.to_thread(wait_for_event, agent, FILLED)
    assert (found["first_segment"], found["last_segment"], found["segments"]) == (forged[0], forged[-1], 3)
    await asyncio.to_thread(cluster.wait_until_archived, after)
    stored = await read_wal(agent.settings)
    assert {before, *forged, after} <= set(stored)
    assert [stored[name] for name in forged] == [
        [(cluster.data_directory / "pg_wal" / name).read_bytes()] for name in forged
    ]

    lost = await asyncio.to_thread(archive_only_in_name, stack, 2)
    await asyncio.to_thread(forget, cluster, lost)
    (after,) = await asyncio.to_thread(fill_segments, cluster, 1)
    await asyncio.to_thread(agent.start)
    told = await asyncio.to_thread(wait_for_event, agent, MISSING)
    assert (told["first_segment"], told["last_segment"], told["segments"]) == (lost[0], lost[-1], 2)
    assert told["still_in_pg_wal"] == 0
    # What comes after the gap can be restored again, from a base backup that nobody had to ask for.
    await asyncio.to_thread(wait_for_event, agent, "base backup finished")
    await asyncio.to_thread(wait_for_event, agent, "wal gap closed")
    assert agent.metric("pitr_wal_gaps") == agent.metric("pitr_wal_gap_segments") == 0
    assert len(events(agent, MISSING)) == len(events(agent, "base backup asked for because of a wal gap")) == 1
    (backup,) = json.loads(pitr("backup", "list", "--json", settings=agent.settings).stdout)
    assert backup["name"].removeprefix("base_") > lost[-1]


def make_standby(stack: Stack, make_agent: MakeAgent, **settings: str) -> tuple[PostgresCluster, AgentProcess]:
    """A streaming standby of the stack's server with an agent of its own on the same repository; both run."""
    directory = stack.cluster.data_directory.with_name("standby")
    socket = directory.with_name("standby-agent") / "agent.sock"
    standby = PostgresCluster(directory, stack.cluster.binaries, environment={"PITR_SOCKET": str(socket)})
    stack.cluster.run("pg_basebackup", f"--pgdata={directory}", "--write-recovery-conf", "--checkpoint=fast")
    # else a checkpoint at promotion may recycle what the test looks for
    standby.configure(wal_keep_size="256MB", **settings)
    agent = make_agent({**stack.repository, **standby.client_environment}, name=socket.parent.name)
    agent.start()
    standby.start()
    return standby, agent


async def test_a_promoted_standby_archives_what_the_old_primary_had_not(
    stack: Stack, make_agent: MakeAgent, pitr: RunPitr
) -> None:
    primary = stack.cluster
    taken = await asyncio.to_thread(pitr, "backup", "now", settings=stack.agent.settings)
    assert taken.returncode == 0, taken.stderr
    standby, agent = await asyncio.to_thread(make_standby, stack, make_agent)
    try:
        stack.agent.kill()
        pending = await asyncio.to_thread(fill_segments, primary, 3)
        primary.execute("CREATE TABLE last_words AS SELECT 1")
        position = primary.value("SELECT pg_current_wal_flush_lsn()")
        await asyncio.to_thread(
            wait_until,
            lambda: standby.value("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [position]),
            seconds=60,
            what="the standby to follow",
        )
        assert not set(pending) & set(await read_wal(agent.settings))
        await asyncio.to_thread(primary.stop, "immediate")
        assert standby.value("SELECT pg_promote()")

        filled = await asyncio.to_thread(wait_for_event, agent, FILLED)
        assert (filled["first_segment"], filled["last_segment"]) == (pending[0], pending[-1])
        (after,) = await asyncio.to_thread(fill_segments, standby, 1)
        await asyncio.to_thread(standby.wait_until_archived, after)
    finally:
        standby.kill()
    stored = await read_wal(agent.settings)
    assert {*pending, "00000002.history", after} <= set(stored)
    places = [segment_position(name, MIB) for name in (pending[-1], after)]
    numbers = [place[1] for place in places if place is not None]
    assert numbers == [numbers[0], numbers[0] + 1], "nothing lies between the timelines"
    assert events(agent, MISSING) == []
    plan = await asyncio.to_thread(pitr, "restore", "--plan", "--json", settings=agent.settings)
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["wal"]["last"] == after


async def test_a_standby_that_archives_all_it_receives_stores_nothing_twice(
    stack: Stack, make_agent: MakeAgent
) -> None:
    standby, agent = await asyncio.to_thread(make_standby, stack, make_agent, archive_mode="always")
    try:
        names = await asyncio.to_thread(fill_segments, stack.cluster, 20)
        await asyncio.to_thread(fill_segments, stack.cluster, 1)  # only then does the standby know that the last ended
        last = "SELECT coalesce(last_archived_wal, '') >= %s FROM pg_stat_archiver"
        for server in (stack.cluster, standby):
            await asyncio.to_thread(
                wait_until, lambda server=server: server.value(last, [names[-1]]), seconds=60, what="all to be archived"
            )
            assert server.value("SELECT failed_count FROM pg_stat_archiver") == 0
    finally:
        standby.kill()
    for name in names:
        stored = [
            line["already_archived"]
            for each in (stack.agent, agent)
            for line in events(each, "wal archived")
            if line["wal_file"] == name
        ]
        assert sorted(stored) == [False, True], "one of them stored it, and the other one found it"
    contents = await read_wal(agent.settings)
    assert all(len(contents[name]) == 1 for name in names)
