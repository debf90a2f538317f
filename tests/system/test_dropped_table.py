"""Somebody dropped a table, and all that is known is about when: the archive tells the rest."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.domain.lsn import parse_lsn
from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from tests.support.stack import Stack
from tests.support.wal_history import waldump
from tests.support.walg_buckets import WalgBucket, needs_walg_buckets

INSERT = "INSERT INTO payments (note) VALUES (repeat('x', 50));\n"


def pay(stack: Stack, transactions: int) -> None:
    how = ["--client=4", f"--transactions={transactions}", "--no-vacuum", "--file=-", "postgres"]
    stack.cluster.run("pgbench", *how, stdin=INSERT)


def around(stack: Stack, moment: datetime, *options: str) -> dict[str, Any]:
    done = run_pitr("wal", "around", moment.isoformat(), *options, "--json", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def restored(stack: Stack, name: str, target: dict[str, str]) -> PostgresCluster:
    directory = stack.cluster.data_directory.parent / name
    settings = {
        **stack.repository,
        **target,
        "PGDATA": str(directory),
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries.directory),
        "AUTO_START": "true",
    }
    done = run_pitr("restore", settings=settings)
    assert done.returncode == 0, done.stderr
    return PostgresCluster(directory, stack.cluster.binaries)


async def test_the_transaction_that_dropped_a_table_is_found_and_undone(stack: Stack) -> None:
    await asyncio.to_thread(drop_and_go_back, stack)


def drop_and_go_back(stack: Stack) -> None:
    cluster = stack.cluster
    cluster.execute(
        "CREATE TABLE payments (id bigserial, xid bigint DEFAULT txid_current(), note text)",
        "CREATE TABLE orders AS SELECT n AS id FROM generate_series(1, 20000) AS n",
    )
    assert run_pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    size = cluster.value("SELECT pg_relation_size('orders')")
    stack.keep_copies()
    with ThreadPoolExecutor() as pool:
        load = pool.submit(pay, stack, 300)
        wait_until(lambda: cluster.value("SELECT count(*) >= 100 FROM payments"), seconds=60, what="payments")
        cluster.execute("DROP TABLE orders")
        load.result()
    pay(stack, 25)  # some come after it, however late it was
    noticed = datetime.now(UTC)
    cluster.wait_until_archived(cluster.switch_wal())

    found = around(stack, noticed, "--before", "1h", "--limit", "10")
    (drop,) = (ended for ended in found["transactions"] if ended["marks"])
    xid = drop["xid"]
    assert drop["marks"] == ["DROP"]
    assert [(file["kind"], file["name"], file["bytes"]) for file in drop["dropped"]] == [("table", "orders", size)]
    assert drop["target_before"] == {"TARGET_XID": str(xid), "TARGET_INCLUSIVE": "false"}
    assert (len(found["transactions"]), found["left_out"] >= 1100) == (10, True)

    said = run_pitr("wal", "around", noticed.isoformat(), "--before=1h", settings=stack.agent.settings).stdout
    assert re.search(rf" {xid} .* DROP table orders \({size / 1024:.1f} KiB\)", said), said
    assert f"TARGET_XID={xid} TARGET_INCLUSIVE=false pitr restore --plan" in said
    time_before = re.search(r"TARGET_TIME=(\S+)", said)
    assert time_before, said
    plan = run_pitr("restore", "--plan", settings={**stack.repository, "TARGET_TIME": time_before[1]})
    assert plan.returncode == 0, plan.stderr

    segments = sorted(path for path in stack.copies.iterdir() if re.fullmatch("[0-9A-F]{24}", path.name))
    told = list(waldump(cluster.binaries["pg_waldump"], segments))
    before = [each.xid for each in told if each.commits and each.lsn < parse_lsn(drop["lsn"])]
    with restored(stack, "restored", drop["target_before"]) as back:
        back.start()
        paid = {row for (row,) in cluster.query("SELECT xid FROM payments")}
        assert {row for (row,) in back.query("SELECT xid FROM payments")} == paid & set(before)
        assert back.query("SELECT count(*), sum(id) FROM orders") == [(20000, 20000 * 20001 // 2)]
        assert 100 <= len(paid & set(before)) < len(paid)


@needs_walg_buckets
def test_the_drop_in_a_repository_of_walg_is_found_with_the_recorded_id() -> None:
    bucket = WalgBucket("pg15-lz4-full")
    known = {point["id"]: point for point in bucket.expected["checkpoints"]}
    moment = known["before-drop"]["target_time"]
    done = run_pitr("wal", "around", moment, "--json", settings=bucket.settings)
    assert done.returncode == 0, done.stderr
    (drop,) = (ended for ended in json.loads(done.stdout)["transactions"] if "DROP" in ended["marks"])
    assert drop["xid"] == known["before-drop-by-transaction"]["target_xid"]
    assert ("table", "orders") in [(file["kind"], file["name"]) for file in drop["dropped"]]


async def test_a_dropped_database_is_brought_back_by_the_target_before_it(stack: Stack) -> None:
    await asyncio.to_thread(drop_database_and_go_back, stack)


def drop_database_and_go_back(stack: Stack) -> None:
    cluster = stack.cluster
    cluster.execute("CREATE DATABASE shop")
    assert run_pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    cluster.execute("CREATE TABLE before_it (i int)", "DROP DATABASE shop", "CREATE TABLE after_it (i int)")
    cluster.wait_until_archived(cluster.switch_wal())
    found = around(stack, datetime.now(UTC), "--before", "1h")
    (drop,) = (ended for ended in found["transactions"] if ended["marks"])
    assert drop["marks"] == ["DROP DATABASE"]
    with restored(stack, "restored", drop["target_before"]) as back:
        back.start()
        assert back.query("SELECT to_regclass('before_it') IS NOT NULL, to_regclass('after_it') IS NULL") == [
            (True, True)
        ]
        with back.connect(dbname="shop") as connection:
            connection.execute("SELECT 1")


@needs_walg_buckets
@pytest.mark.parametrize(
    ("moment", "code", "words"),
    [
        ("2026-12-24T18:00:00Z", 40, "the last one on the way to timeline 1 ended 2026-11-22T20:38:"),
        ("2026-11-01T18:00:00Z", 40, "the first transaction that it shows ended at 2026-11-22T20:38:"),
        ("2026-11-22T14:30:00", 10, "Add one: 2026-11-22T14:30:00Z"),
        ("0001-01-01T00:00:00Z", 10, "is not within the years 1 to 9999"),
    ],
)
def test_a_time_that_is_not_archived_is_refused_with_the_time_that_is(moment: str, code: int, words: str) -> None:
    done = run_pitr("wal", "around", moment, settings=WalgBucket("pg15-lz4-full").settings)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("option", [["--before", "soon"], ["--limit", "0"]])
def test_an_option_that_is_none_is_refused(option: list[str]) -> None:
    done = run_pitr("wal", "around", "2026-11-22T14:30:00Z", *option, settings={"WALG_FILE_PREFIX": "/nowhere"})
    assert done.returncode in (2, 10), done.stderr
