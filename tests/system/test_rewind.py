"""pg_rewind asks the agent for the WAL that the server it rewinds has no longer."""

from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent
from tests.support.stack import Stack

SECONDS = 60


def promoted_standby(stack: Stack, make_agent: MakeAgent) -> tuple[PostgresCluster, AgentProcess]:
    """A server that left the stack's, with an agent of its own; both run."""
    directory = stack.cluster.data_directory.with_name("standby")
    socket = directory.with_name("standby-agent") / "agent.sock"
    standby = PostgresCluster(directory, stack.cluster.binaries, environment={"PITR_SOCKET": str(socket)})
    stack.cluster.run("pg_basebackup", f"--pgdata={directory}", "--write-recovery-conf", "--checkpoint=fast")
    standby.configure()
    agent = make_agent({**stack.repository, **standby.client_environment}, name=socket.parent.name)
    agent.start()
    standby.start()
    assert standby.value("SELECT pg_promote()")
    standby.execute("CHECKPOINT", "CREATE TABLE promoted AS SELECT 'stays' AS row")
    return standby, agent


def test_a_server_that_diverged_is_rewound_with_wal_that_only_the_archive_has(
    stack: Stack, make_agent: MakeAgent
) -> None:
    old = stack.cluster
    new, _ = promoted_standby(stack, make_agent)
    try:
        diverged = []
        for number in range(4):
            old.execute(f"CREATE TABLE diverged{number} AS SELECT 'goes' AS row")
            diverged.append(old.switch_wal())
        old.wait_until_archived(diverged[-1])
        old.stop()
        pg_wal = old.data_directory / "pg_wal"
        for name in diverged:
            (pg_wal / name).unlink(missing_ok=True)  # most went with the checkpoint of the shutdown

        rewind = ("pg_rewind", f"--target-pgdata={old.data_directory}", f"--source-server={new.conninfo}")
        said = old.run(*rewind, "--restore-target-wal", "--write-recovery-conf")
        assert "Done!" in said
        assert not list(pg_wal.glob("pitr.spool/*")), "nothing was read ahead"
        asked = [line["wal_file"] for line in stack.agent.log_lines() if line["event"] == "wal_fetch"]
        assert diverged[0] in asked

        old.start()
        copied = "SELECT to_regclass('promoted') IS NOT NULL"
        wait_until(lambda: old.value(copied), seconds=SECONDS, what="the new primary's table")
        assert old.value("SELECT count(*) FROM pg_class WHERE relname LIKE 'diverged%'") == 0
    finally:
        new.kill()
