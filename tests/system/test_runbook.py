"""The runbook, on one server: daily life and the restore at 3 a.m., in the order in which people do it."""

import asyncio
import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.domain.control_file import ClusterState
from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from agent.postgres.data_directory import DataDirectory
from tests.support.stack import MakeStack, Stack

SECONDS = 120
K8S = Path(__file__).parents[2] / "k8s" / "postgres-pitr"
PATCH = """
    (.spec.template.spec.containers[0].env[] | select(.name == "TARGET_TIME")).value = "{time}"
    | (.spec.template.spec.containers[0].env[] | select(.name == "BACKUP_NAME")).value = "{backup}"
"""


def pitr(stack: Stack, *arguments: str) -> Any:
    """Run `pitr ... --json` as in the agent's container; return what it prints."""
    done = run_pitr(*arguments, "--json", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def patched_job(time: str, backup: str) -> dict[str, str]:
    """Return the environment that the restore Job has once yq has patched it."""
    line = ["yq", PATCH.format(time=time, backup=backup), str(K8S / "restore-job.yaml")]
    job = yaml.safe_load(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["pitr", "agent"]
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


@pytest.mark.skipif(shutil.which("yq") is None, reason="yq is not installed")
async def test_a_table_that_was_dropped_comes_back_by_the_runbook(
    make_stack: MakeStack, s3_environment: dict[str, str]
) -> None:
    await asyncio.to_thread(
        lose_a_table_and_get_it_back,
        make_stack(repository=s3_environment, settings={"PITR_BACKUP_SCHEDULE": "0 0 1 1 *"}),
    )


def lose_a_table_and_get_it_back(stack: Stack) -> None:
    cluster = stack.cluster
    cluster.execute("CREATE TABLE orders AS SELECT n AS id FROM generate_series(1, 5000) AS n")
    cluster.wait_until_archived(cluster.switch_wal())
    metric = "postgres_base_backup_last_success_timestamp"
    wait_until(lambda: stack.agent.metric(metric) > 0, seconds=SECONDS, what="the first base backup, taken by itself")
    (backup,) = pitr(stack, "backup", "list")
    cluster.execute("INSERT INTO orders SELECT generate_series(5001, 6000)")
    moment = cluster.value("SELECT to_json(clock_timestamp())")

    cluster.execute("DROP TABLE orders", "CREATE TABLE written_since AS SELECT 1 AS one")
    cluster.wait_until_archived(cluster.switch_wal())
    assert pitr(stack, "window")["gaps"] == []
    around = pitr(stack, "wal", "around", datetime.now(UTC).isoformat(), "--before", "30m")
    (drop,) = (ended for ended in around["transactions"] if "DROP" in ended["marks"])
    assert datetime.fromisoformat(moment) < datetime.fromisoformat(drop["time"])
    assert pitr(stack, "verify")["ok"]

    beside = cluster.data_directory.parent / "restored"
    settings = {
        **stack.repository,
        **patched_job(moment, backup["name"]),
        "PGDATA": str(beside),
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_POSTGRES_BIN": str(cluster.binaries.directory),
        "PITR_SOCKET": str(beside.parent / "job.sock"),
        "PITR_HTTP_LISTEN": "127.0.0.1:0",
    }
    plan = run_pitr("restore", "--plan", "--json", settings=settings)
    assert json.loads(plan.stdout)["backup"] == backup["name"], plan.stderr
    job = run_pitr("agent", settings=settings)
    assert job.returncode == 0, job.stderr  # the Job is Complete
    events = [json.loads(line)["event"] for line in (job.stdout + job.stderr).splitlines() if line.startswith("{")]
    assert events.index("backup_fetch") < events.index("wal_fetch") < events.index("server promoted")
    assert DataDirectory(beside).control_file().state is ClusterState.SHUT_DOWN

    (container,) = yaml.safe_load((K8S / "restored-server.yaml").read_text())["spec"]["containers"]
    with PostgresCluster(beside, cluster.binaries) as restored:
        restored.start(*container["args"][1:])
        assert restored.value("SHOW archive_mode") == "off"
        dump = restored.run("pg_dump", "--dbname=postgres", "--table=public.orders")
    cluster.run("psql", "--set=ON_ERROR_STOP=1", "--single-transaction", "--dbname=postgres", stdin=dump)
    assert cluster.value("SELECT count(*) FROM orders") == 6000
    assert cluster.value("SELECT one FROM written_since") == 1

    pitr(stack, "backup", "now", "--full")
    keep_one = ("expire", "--retention", "full=1")
    assert [each["stays"] for each in pitr(stack, *keep_one)["backups"]] == [False, True]
    pitr(stack, *keep_one, "--confirm")
    assert [each["name"] for each in pitr(stack, "backup", "list")] != [backup["name"]]
