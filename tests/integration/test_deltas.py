"""Deltas of a busy server restore every row: those that changed before them, and those that did not."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.domain.catalog import Backup
from agent.domain.delta_parent import DeltaPolicy
from agent.lab.postgres import PostgresCluster
from agent.repository.keys import files_metadata_key
from tests.support.base_backup import BackupLab, rows_changing, start_lab
from tests.support.postgres import MakeCluster
from tests.support.recovered import hydrated, pages_with_a_wrong_checksum, running

DELTAS = DeltaPolicy(max_steps=5)
ROWS = 8_000  # of about 230 bytes: 250 pages

SUMMARIES = {"summarize_wal": "on"}
SERVERS: list[tuple[int, dict[str, Any]]] = [
    (13, {}), (14, {}), (15, {}), (16, {}), (17, {}), (17, SUMMARIES), (18, SUMMARIES)
]  # fmt: skip


def nothing(_: object) -> None:
    """Report to nobody."""


def make_old(cluster: PostgresCluster) -> None:
    """Let the files of a cluster be an hour old: what was made just before a backup is not taken for known."""
    hour_ago = time.time() - 3600
    for path in (cluster.data_directory, *cluster.data_directory.rglob("*")):
        os.utime(path, (hour_ago, hour_ago))


def fill(cluster: PostgresCluster) -> None:
    for table in ("quiet", "early", "late", "grows", "shrinks", "replaced"):
        cluster.execute(
            f"CREATE TABLE {table} AS SELECT i AS id, repeat(md5(i::text), 6) AS filler, 0 AS changed "
            f"FROM generate_series(1, {ROWS}) i",
            f"CREATE INDEX ON {table} (id)",
        )


def rows(cluster: PostgresCluster) -> dict[str, Any]:
    """Return a digest of each table's rows, by all of them and by those that its index finds."""
    tables = cluster.query("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
    return {
        table: cluster.query(
            f"SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)), "
            f"(SELECT count(*) FROM {table} WHERE id BETWEEN 1 AND {2 * ROWS}) FROM {table} t"
        )
        for (table,) in tables
        if table != "passing"
    }


def document(lab: BackupLab, key: str) -> Any:
    return json.loads((lab.store.root / key).read_bytes())


def member(lab: BackupLab, backup: Backup, table: str) -> Mapping[str, Any]:
    """Return what the backup's list says of the file of `table`."""
    path = lab.cluster.value("SELECT pg_relation_filepath(%s)", [table])
    result: Mapping[str, Any] = document(lab, files_metadata_key(backup.name))["Files"][f"/{path}"]
    return result


@pytest.mark.parametrize(
    ("major", "settings"), SERVERS, ids=[f"{major}{' summarized' * bool(settings)}" for major, settings in SERVERS]
)
async def test_a_chain_of_deltas_under_load_restores_every_row(
    major: int, settings: Mapping[str, Any], make_cluster: MakeCluster, lab_directory: Path
) -> None:
    cluster = make_cluster(major, autovacuum=False, **settings)
    make_old(cluster)
    lab = start_lab(cluster, lab_directory)
    taker = lab.taker(deltas=DELTAS)
    fill(cluster)
    with rows_changing(cluster), capture_logs() as logs:
        full = await taker.take(nothing)
        cluster.execute(
            "UPDATE early SET changed = 1 WHERE id % 300 = 0",
            f"INSERT INTO grows SELECT i, 'new', 0 FROM generate_series({ROWS + 1}, {ROWS + 1000}) i",
            f"DELETE FROM shrinks WHERE id > {ROWS // 2}",
            "VACUUM (TRUNCATE) shrinks",
            "TRUNCATE replaced",
            "INSERT INTO replaced VALUES (1, 'again', 0)",
            "CREATE DATABASE late_database",
        )
        delta = await taker.take(nothing)
        cluster.execute(
            "UPDATE late SET changed = 2 WHERE id % 400 = 0",
            f"INSERT INTO shrinks SELECT i, 'regrown', 3 FROM generate_series({ROWS}, {ROWS + 1000}) i",
        )
        second = await taker.take(nothing)
    summarized = [entry for entry in logs if entry["event"] == "changed blocks are known from WAL summaries"]
    assert len(summarized) == (2 if settings else 0)
    expected = rows(cluster)
    cluster.wait_until_archived(cluster.switch_wal())

    assert (full.is_delta, delta.parent, second.parent, second.full) == (False, full.name, delta.name, full.name)
    assert delta.name == f"base_{delta.start_segment}_D_{full.start_segment}"
    assert member(lab, second, "late")["IsIncremented"]
    assert not member(lab, second, "late")["IsSkipped"]
    for name in (delta.name, second.name):
        await hydrated(lab, name, lab_directory / name)
        with running(lab, lab_directory / name) as restored:
            assert rows(restored) == expected
            restored.stop()
        assert pages_with_a_wrong_checksum(lab_directory / name) == []
