"""Two agents on one volume, as while one pod replaces another, or beside a pod for debugging: nothing is lost by it."""

import asyncio
from contextlib import suppress
from pathlib import Path

import psycopg

from agent.domain.wal import WalFileKind, wal_file_kind
from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent, RunPitr
from tests.support.repository import read_wal
from tests.support.stack import Stack

SEGMENTS = 12


def alternate(hook: Path, arguments: str, one: AgentProcess, other: AgentProcess) -> str:
    """Return a command that asks the two agents in turn, by a WAL file's last digit."""
    choice = f"case %f in *[02468ACE]) s={one.socket};; *) s={other.socket};; esac"
    return f"{choice}; PITR_SOCKET=$s {hook} {arguments}"


def write(cluster: PostgresCluster, start: int) -> None:
    for number in range(start, start + SEGMENTS):
        cluster.execute(f"INSERT INTO t VALUES ({number})")
        cluster.wait_until_archived(cluster.switch_wal())


def is_open(cluster: PostgresCluster) -> bool:
    """Tell whether recovery has ended and clients are served."""
    with suppress(psycopg.OperationalError):
        return cluster.value("SELECT NOT pg_is_in_recovery()") is True
    return False


async def test_two_agents_on_one_volume_archive_back_up_and_restore_as_one_would(
    stack: Stack, make_agent: MakeAgent, pitr: RunPitr, lab_directory: Path
) -> None:
    cluster, hooks = stack.cluster, stack.hooks
    second = make_agent({**stack.agent.settings, "PITR_SOCKET": str(lab_directory / "second" / "agent.sock"),
                         "PITR_HTTP_LISTEN": "127.0.0.1:0"}, name="second")  # fmt: skip
    await asyncio.to_thread(second.start, wait=False)
    await asyncio.to_thread(wait_until, second.socket.is_socket, seconds=60, what="the second agent's socket")

    archive = alternate(hooks / "wal-archive.sh", "%p %f", stack.agent, second)
    cluster.execute(f"ALTER SYSTEM SET archive_command = '{archive} && cp %p {stack.copies}/%f'")
    cluster.execute("SELECT pg_reload_conf()", "CREATE TABLE t (i int)")
    both = [asyncio.to_thread(pitr, "backup", "now", settings=agent.settings) for agent in (stack.agent, second)]
    outcomes = await asyncio.gather(*both)
    assert 0 in [each.returncode for each in outcomes], outcomes
    await asyncio.to_thread(write, cluster, 1)
    copies = {path.name: path.read_bytes() for path in stack.copies.iterdir()}
    stored = await read_wal(stack.agent.settings)
    assert {name: stored[name] for name in copies} == {name: [content] for name, content in copies.items()}
    assert sum(wal_file_kind(name) is WalFileKind.SEGMENT for name in copies) >= SEGMENTS

    directory = lab_directory / "restored"
    settings = {**stack.repository, "PGDATA": str(directory), "PITR_HOOK_DIR": str(hooks)}
    assert (await asyncio.to_thread(pitr, "restore", settings=settings)).returncode == 0
    here = {**stack.repository, "PGDATA": str(directory)}
    agents = [make_agent(here, name=name) for name in ("here", "there")]
    for agent in agents:
        await asyncio.to_thread(agent.start)
    restored = PostgresCluster(directory, cluster.binaries)
    with restored:
        command = alternate(hooks / "wal-restore.sh", "%f %p", *agents)
        await asyncio.to_thread(restored.start, "-c", f"restore_command={command}")
        await asyncio.to_thread(wait_until, lambda: is_open(restored), seconds=60, what="the promotion")
        assert restored.value("SELECT array_agg(i ORDER BY i) FROM t") == list(range(1, SEGMENTS + 1))
    fetched = {name for agent in agents for name in events(agent)}
    assert all(events(agent) for agent in agents), "both have served recovery"
    assert len(fetched) >= SEGMENTS


def events(agent: AgentProcess) -> set[str]:
    return {line["wal_file"] for line in agent.log_lines() if line["event"] == "wal_fetch"}
