"""What programs read from `pitr`: JSON with the promised keys."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent.domain.lsn import parse_lsn
from agent.lab.agent_process import run_pitr
from tests.support.stack import Stack

LIST_KEYS = [
    "name",
    "kind",
    "parent",
    "timeline",
    "start_time",
    "finish_time",
    "start_lsn",
    "finish_lsn",
    "pg_version",
    "system_identifier",
    "size_bytes",
    "stored_bytes",
    "permanent",
    "corrupt_pages",
    "verified_at",
    "problems",
    "drilled_at",
    "drilled_to",
    "drill_seconds",
    "drill_failed_at",
    "drill_exit_code",
]
PLAN_KEYS = [
    "reachable",
    "reason",
    "target",
    "backup",
    "chain",
    "timeline",
    "wal",
    "download_bytes",
    "restored_bytes",
    "disk_bytes",
    "download_seconds",
    "hydrate_seconds",
    "replay_seconds",
    "replay_measured_at",
    "nearest",
    "problems",
]


def read_json(stack: Stack, *arguments: str, target: str = "", code: int = 0) -> Any:
    done = run_pitr(*arguments, "--json", settings={**stack.agent.settings, "TARGET_TIME": target})
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


async def test_the_catalog_and_the_plan_have_the_promised_keys(stack: Stack) -> None:
    taken = await asyncio.to_thread(read_json, stack, "backup", "now")
    stack.cluster.execute("CREATE TABLE t ()")
    committed = datetime.now(UTC)
    stack.cluster.execute("CREATE TABLE later ()")
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())

    (backup,) = await asyncio.to_thread(read_json, stack, "backup", "list")
    assert list(backup) == LIST_KEYS
    assert backup["name"] == taken["backup"]
    assert (backup["kind"], backup["parent"], backup["permanent"]) == ("full", None, False)
    assert parse_lsn(backup["start_lsn"]) < parse_lsn(backup["finish_lsn"])
    assert datetime.fromisoformat(backup["start_time"]) < datetime.fromisoformat(backup["finish_time"]) < committed
    assert backup["system_identifier"] == stack.cluster.value("SELECT system_identifier FROM pg_control_system()")

    plan = await asyncio.to_thread(read_json, stack, "restore", "--plan", target=committed.isoformat())
    assert list(plan) == PLAN_KEYS
    assert (plan["reachable"], plan["backup"], plan["chain"]) == (True, backup["name"], [backup["name"]])
    assert datetime.fromisoformat(plan["target"]["time"]) == committed
    assert plan["wal"]["segments"] == int(plan["wal"]["last"], 16) - int(plan["wal"]["first"], 16) + 1
    assert plan["restored_bytes"] == backup["size_bytes"]

    window = await asyncio.to_thread(read_json, stack, "window")
    (timeline,) = window["timelines"]
    (reach,) = timeline["ranges"]
    assert window["system_identifier"] == backup["system_identifier"]
    assert (timeline["timeline"], timeline["parent"], timeline["switch_lsn"], window["gaps"]) == (1, None, None, [])
    assert (reach["backup"], reach["from_lsn"], reach["from_time"]) == (
        backup["name"],
        backup["finish_lsn"],
        backup["finish_time"],
    )
    assert datetime.fromisoformat(reach["to_time"]) > committed
    told = await asyncio.to_thread(run_pitr, "window", settings=stack.agent.settings)
    assert told.stdout.startswith("Any moment from ")

    too_late = (committed + timedelta(hours=1)).isoformat()
    plan = await asyncio.to_thread(read_json, stack, "restore", "--plan", target=too_late, code=40)
    assert list(plan) == PLAN_KEYS
    assert not plan["reachable"]
    assert plan["reason"]
    assert datetime.fromisoformat(plan["nearest"]["before"]) > committed
    assert plan["nearest"]["after"] is None


async def test_a_restore_point_is_told_by_its_name_whatever_brackets_are_in_it(
    stack: Stack, lab_directory: Path
) -> None:
    await asyncio.to_thread(read_json, stack, "backup", "now")
    name = "before [release] and [/after]"
    stack.cluster.execute(f"SELECT pg_create_restore_point('{name}')")
    await asyncio.to_thread(stack.cluster.wait_until_archived, stack.cluster.switch_wal())
    target = {**stack.repository, "TARGET_NAME": name, "PGDATA": str(lab_directory / "restored"), "COLUMNS": "200"}
    for command in (["restore", "--plan"], ["restore"]):
        done = await asyncio.to_thread(run_pitr, *command, settings=target)
        assert done.returncode == 0, done.stderr
        assert f'restore point "{name}"' in done.stdout
