"""A standby bootstrapped from the repository: it catches up from there, and then streams from its primary."""

import json
import re
from pathlib import Path

import psycopg
import pytest

from agent.lab.agent_process import AgentProcess, run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from agent.restore.standby import PASSWORD_FILE
from tests.support.agent_process import MakeAgent, RunPitr
from tests.support.stack import MakeStack, Stack

SECRET = "c4n:4ry\\"
SECONDS = 60


def let_replicate_by_password(primary: PostgresCluster) -> None:
    hba = primary.data_directory / "pg_hba.conf"
    hba.write_text("local replication replicator scram-sha-256\n" + hba.read_text())
    primary.execute(f"CREATE ROLE replicator REPLICATION LOGIN PASSWORD '{SECRET}'", "SELECT pg_reload_conf()")


def test_a_standby_catches_up_from_the_repository_and_streams_the_rest(
    stack: Stack, pitr: RunPitr, make_agent: MakeAgent, lab_directory: Path
) -> None:
    primary, directory = stack.cluster, lab_directory / "standby"
    let_replicate_by_password(primary)
    assert pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    primary.execute("CREATE TABLE followed AS SELECT 'archived' AS by")
    primary.wait_until_archived(primary.switch_wal())
    settings = {
        **stack.repository,
        "PGDATA": str(directory),
        "PITR_RESTORE_AS": "standby",
        "PITR_PRIMARY_CONNINFO": f"host={primary.socket_directory} port={primary.port} user=replicator "
        f"password='{SECRET.replace(chr(92), chr(92) * 2)}'",
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_VALIDATE_SQL": "SELECT true",  # of the restores and drills that share its ConfigMap
    }
    for change, told in (
        ({"AUTO_START": "true"}, "a standby is not promoted"),
        ({"TARGET_XID": "700"}, "a standby follows its primary"),
        ({"PITR_PRIMARY_CONNINFO": f"host {SECRET}"}, "PITR_PRIMARY_CONNINFO is no connection string"),
    ):
        refused = pitr("restore", settings=settings | change)
        assert refused.returncode == 10, refused.stderr
        assert told in " ".join(refused.stderr.split())
        assert SECRET not in refused.stdout + refused.stderr

    done = pitr("restore", "--json", settings=settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "hydrated"
    assert SECRET not in done.stdout + done.stderr
    assert SECRET not in (directory / "pitr.recovery.conf").read_text()
    assert (directory / PASSWORD_FILE).stat().st_mode & 0o777 == 0o600

    agent = make_agent({**stack.repository, "PGDATA": str(directory)}, name="standby-agent")
    agent.start()
    environment = {"PITR_SOCKET": str(agent.socket)}
    with PostgresCluster(directory, primary.binaries, environment=environment) as standby:
        standby.start()
        streaming = "SELECT count(*) FROM pg_stat_replication WHERE usename = 'replicator' AND state = 'streaming'"
        wait_until(lambda: primary.value(streaming) == 1, seconds=SECONDS, what="the standby to stream")
        assert "wal_fetch" in [line["event"] for line in agent.log_lines()]
        primary.execute("INSERT INTO followed VALUES ('streamed')")
        rows = "SELECT array_agg(by ORDER BY by) FROM followed"
        wait_until(lambda: standby.value(rows) == ["archived", "streamed"], seconds=SECONDS, what="the row to arrive")
        assert standby.value("SELECT pg_is_in_recovery()")
        assert standby.value("SHOW archive_mode") == "on"
        again = pitr("restore", "--json", settings=settings)
        assert again.returncode == 0, again.stderr
        assert standby.value("SELECT pg_is_in_recovery()")


def holds_both(standby: PostgresCluster) -> bool:
    try:
        return bool(standby.value("SELECT array_agg(i) = '{1,2}' FROM behind_it"))
    except psycopg.errors.UndefinedTable:
        return False


def limits_found(agent: AgentProcess, standby: PostgresCluster) -> dict[str, str]:
    """Return what `pitr check` says of limits."""
    done = run_pitr("check", "--json", "--no-switch", settings={**agent.settings, **standby.client_environment})
    findings: list[dict[str, str]] = json.loads(done.stdout)["checks"]
    return next((each for each in findings if each["check"] == "limits"), {})


@pytest.mark.parametrize("major", [13, 18])
def test_a_standby_has_the_limits_that_its_primary_raised_after_the_base_backup(
    major: int,
    make_stack: MakeStack,
    s3_environment: dict[str, str],
    pitr: RunPitr,
    make_agent: MakeAgent,
    lab_directory: Path,
) -> None:
    stack = make_stack(repository=s3_environment, major=major)
    primary, directory = stack.cluster, lab_directory / "standby"
    assert pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    raised = {
        "max_connections": 40,
        "max_worker_processes": 20,
        "max_wal_senders": 12,
        "max_prepared_transactions": 5,
        "max_locks_per_transaction": 100,
    }
    primary.configure(**raised)
    primary.restart()
    primary.execute("CREATE TABLE behind_it AS SELECT 1 AS i")
    primary.configure(max_connections=20)
    primary.restart()
    primary.execute("INSERT INTO behind_it VALUES (2)")
    primary.wait_until_archived(primary.switch_wal())
    settings = {
        **stack.repository,
        "PGDATA": str(directory),
        "PITR_RESTORE_AS": "standby",
        "PITR_HOOK_DIR": str(stack.hooks),
    }
    done = pitr("restore", "--json", settings=settings)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["seconds"]) == {"planning", "hydrating", "preparing"}
    agent = make_agent({**stack.repository, "PGDATA": str(directory)}, name="standby-agent")
    agent.start()
    with PostgresCluster(directory, primary.binaries, environment={"PITR_SOCKET": str(agent.socket)}) as standby:
        standby.start()
        wait_until(lambda: holds_both(standby), seconds=SECONDS, what="the standby to replay what is archived")
        assert {name: int(standby.value(f"SHOW {name}")) for name in raised} == raised
        standby.execute("SELECT pg_promote()")
        found = limits_found(agent, standby)
        assert found["result"] == "warn"
        assert "max_connections = 40, max_worker_processes = 20" in found["text"]
        standby.execute(*re.findall("ALTER SYSTEM RESET [a-z_]+;", found["fix"]))
        own = {name: value + 1 for name, value in raised.items()}
        standby.configure(**own)
        standby.restart()
        assert {name: int(standby.value(f"SHOW {name}")) for name in raised} == own
        assert limits_found(agent, standby) == {}
