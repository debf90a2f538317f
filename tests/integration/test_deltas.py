"""Deltas of a busy server restore every row: those that changed before them, and those that did not."""

import asyncio
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from structlog.testing import capture_logs

from agent.domain.catalog import Backup
from agent.domain.control_file import parse_control_file
from agent.domain.delta_parent import BackupKind, DeltaPolicy
from agent.domain.verification_order import VerificationRecord
from agent.errors import BackupFailed, RepositoryUnavailable
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_directory
from agent.postgres.data_files import CONTROL_FILE
from agent.repository.backups import read_catalog
from agent.repository.keys import files_metadata_key, manifest_key, sentinel_key
from agent.repository.tar_parts import small_tar
from agent.repository.verification_record import write_record
from tests.support.agent_process import RunPitr
from tests.support.base_backup import BackupLab, RecordingStore, rows_changing, start_lab
from tests.support.object_formats import ZSTD
from tests.support.postgres import FindBinaries, MakeCluster
from tests.support.recovered import hydrated, pages_with_a_wrong_checksum, require_sound, running, verified
from tests.support.walg_buckets import answers, needs_walg_buckets, recovery_points, restore_settings

DELTAS = DeltaPolicy(max_steps=5)
ROWS = 8_000  # of about 230 bytes: 250 pages

SUMMARIES: dict[str, Any] = {"summarize_wal": "on"}
SERVERS: list[tuple[int, dict[str, Any]]] = [
    (13, {}), (14, {}), (15, {}), (16, {}), (17, SUMMARIES), (18, SUMMARIES)
]  # fmt: skip


def nothing(_: object) -> None:
    """Report to nobody."""


def make_old(cluster: PostgresCluster) -> None:
    """Let a cluster's files be from the year 2001: what was made just before a backup is not taken for known."""
    for path in (cluster.data_directory, *cluster.data_directory.rglob("*")):
        os.utime(path, (1e9, 1e9))


def fill(cluster: PostgresCluster, *tables: str) -> None:
    for table in tables:
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
    major: int,
    settings: Mapping[str, Any],
    make_cluster: MakeCluster,
    lab_directory: Path,
    postgres_binaries: FindBinaries,
) -> None:
    """And PostgreSQL's own programs find nothing wrong with it."""
    cluster = make_cluster(major, autovacuum=False, **settings)
    make_old(cluster)
    lab = start_lab(cluster, lab_directory)
    taker = lab.taker(deltas=DELTAS)
    fill(cluster, "quiet", "early", "late", "grows", "shrinks", "replaced")
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
    programs = postgres_binaries(18)
    for backup in (full, delta, second):
        restored_in = lab_directory / f"restored-{backup.delta_count}"
        await hydrated(lab, backup.name, restored_in)
        assert "backup successfully verified" in verified(
            programs["pg_verifybackup"], restored_in, "--ignore=recovery.signal"
        )
        with running(lab, restored_in) as restored:
            assert rows(restored) == expected
            if backup == second:
                require_sound(programs, restored)
            restored.stop()
            if "pg_checksums" in restored.binaries:
                restored.run("pg_checksums", "--check", f"--pgdata={restored_in}")
        assert pages_with_a_wrong_checksum(restored_in) == []


@pytest.fixture
def lab(make_cluster: MakeCluster, lab_directory: Path) -> BackupLab:
    """A running PostgreSQL 15 with some tables, that archives into a directory."""
    cluster = make_cluster(15, autovacuum=False)
    make_old(cluster)
    made = start_lab(cluster, lab_directory)
    fill(cluster, "quiet", "early")
    return made


async def test_what_did_not_change_is_left_out_and_what_did_is_small(lab: BackupLab) -> None:
    full = await lab.taker(deltas=DELTAS).take(nothing)
    lab.cluster.execute("UPDATE early SET changed = 1 WHERE id % 500 = 0")
    first = await lab.taker(deltas=DELTAS).take(nothing)
    second = await lab.taker(deltas=DELTAS).take(nothing)
    assert first.size_bytes < full.size_bytes / 10
    assert member(lab, first, "early")["IsIncremented"]
    assert document(lab, files_metadata_key(second.name))["Files"]["/base/1/PG_VERSION"]["IsSkipped"]
    sentinel = document(lab, sentinel_key(second.name))
    assert {name: sentinel[name] for name in ("DeltaLSN", "DeltaFrom", "DeltaFullName", "DeltaCount")} == {
        "DeltaLSN": first.start_lsn,
        "DeltaFrom": first.name,
        "DeltaFullName": full.name,
        "DeltaCount": 2,
    }
    assert [backup.name for backup in await read_catalog(lab.store)] == [full.name, first.name, second.name]


async def test_by_default_every_backup_is_full_and_deltas_are_taken_on_demand(lab: BackupLab) -> None:
    with pytest.raises(BackupFailed, match="the repository holds no base backup"):
        await lab.taker().take(nothing, BackupKind.DELTA)
    full = await lab.taker().take(nothing)
    assert not (await lab.taker().take(nothing)).is_delta
    assert (await lab.taker().take(nothing, BackupKind.DELTA)).is_delta
    assert not (await lab.taker(deltas=DELTAS).take(nothing, BackupKind.FULL)).is_delta
    assert lab.metrics.backups.labels("delta", "ok")._value.get() == 1
    assert not full.is_delta


@pytest.mark.parametrize(
    "lost", ["files_metadata.json", "tar_partitions/pg_control.tar.zst", "tar_partitions/part_001.tar.zst"]
)
async def test_a_damaged_parent_gives_a_full_backup(lab: BackupLab, lost: str) -> None:
    full = await lab.taker().take(nothing)
    (lab.store.root / f"basebackups_005/{full.name}/{lost}").unlink()
    with capture_logs() as logs:
        backup = await lab.taker(deltas=DELTAS).take(nothing)
    assert not backup.is_delta
    (why,) = (entry["reason"] for entry in logs if entry["event"] == "a full base backup is taken instead of a delta")
    assert full.name in why


async def test_checksums_switched_on_since_give_a_full_backup(lab: BackupLab) -> None:
    full = await lab.taker().take(nothing)
    control = parse_control_file((lab.cluster.data_directory / "global/pg_control").read_bytes(), google_crc32c.value)
    bytes_at_least = os.urandom(4096)  # fewer bytes than were stored would be damage
    content = small_tar({CONTROL_FILE: without_checksums(lab.cluster.data_directory), "more": bytes_at_least}, ZSTD)
    (lab.store.root / f"basebackups_005/{full.name}/tar_partitions/pg_control.tar.zst").write_bytes(content)
    assert control.data_checksums
    with pytest.raises(BackupFailed, match="data checksums were switched since"):
        await lab.taker().take(nothing, BackupKind.DELTA)


def without_checksums(data_directory: Path) -> bytes:
    """Return pg_control as it was before `pg_checksums --enable`. Source: pg_control.h, PostgreSQL 15."""
    content = bytearray((data_directory / "global/pg_control").read_bytes())
    struct.pack_into("<I", content, 252, 0)
    struct.pack_into("<I", content, 288, google_crc32c.value(bytes(content[:288])))
    return bytes(content)


@pytest.mark.parametrize("store_fails_at", ["part_", "pg_control", "files_metadata", "stop_sentinel"])
async def test_an_interrupted_delta_leaves_nothing_and_its_parent_alone(lab: BackupLab, store_fails_at: str) -> None:
    full = await lab.taker().take(nothing)
    before = lab.store.keys()

    async def fail(key: str) -> None:
        if store_fails_at in key:
            raise RepositoryUnavailable("the store is away")

    lab.store.before_put = fail
    with pytest.raises(BackupFailed, match="the store is away"):
        await lab.taker(deltas=DELTAS).take(nothing)
    lab.store.before_put = None
    assert {key for key in lab.store.keys() - before if key.startswith("basebackups_005/")} == set()
    assert (await lab.taker(deltas=DELTAS).take(nothing)).parent == full.name


async def test_a_page_damaged_in_the_parent_and_repaired_since_is_not_inherited(
    lab: BackupLab, lab_directory: Path
) -> None:
    path = lab.cluster.data_directory / lab.cluster.value("SELECT pg_relation_filepath('quiet')")
    lab.cluster.execute("CHECKPOINT")
    intact = path.read_bytes()

    def put(byte: int) -> None:
        with path.open("r+b") as file:
            file.seek(3 * 8192 + 5000)
            file.write(bytes([byte]))

    put(intact[3 * 8192 + 5000] ^ 1)
    full = await lab.taker().take(nothing)
    assert member(lab, full, "quiet")["CorruptBlocks"]["SomeCorruptBlocks"] == [3]
    still = await lab.taker(deltas=DELTAS).take(nothing)
    assert (full.corrupt_pages, still.parent, still.corrupt_pages) == (1, full.name, 1)
    put(intact[3 * 8192 + 5000])
    delta = await lab.taker(deltas=DELTAS).take(nothing)
    assert (delta.parent, delta.corrupt_pages) == (still.name, 0)
    lab.cluster.wait_until_archived(lab.cluster.switch_wal())
    await hydrated(lab, delta.name, lab_directory / "restored")
    assert (lab_directory / "restored" / path.relative_to(lab.cluster.data_directory)).read_bytes() == intact


async def test_nothing_builds_on_what_was_read_back_and_found_damaged(lab: BackupLab) -> None:
    full = await lab.taker().take(nothing)
    await lab.taker(deltas=DELTAS).take(nothing)
    await write_record(lab.store, full.name, VerificationRecord(problems=("part_001.tar.zst is damaged",)))
    with pytest.raises(BackupFailed, match=f"{full.name} is damaged: part_001"):
        await lab.taker(deltas=DELTAS).take(nothing, BackupKind.DELTA)
    assert not (await lab.taker(deltas=DELTAS).take(nothing)).is_delta


@pytest.mark.parametrize("until", ["backup_label", "files_metadata"])
async def test_a_parent_deleted_meanwhile_leaves_no_delta(lab: BackupLab, until: str) -> None:
    full = await lab.taker().take(nothing)

    async def expire(key: str) -> None:
        if until in key:
            await lab.store.delete([sentinel_key(full.name)])

    lab.store.before_put = expire
    with pytest.raises(BackupFailed, match=f"{full.name}.* was deleted meanwhile"):
        await lab.taker(deltas=DELTAS).take(nothing)
    lab.store.before_put = None
    assert await read_catalog(lab.store) == []


async def test_a_delta_with_a_tablespace_restores_every_row(make_cluster: MakeCluster, lab_directory: Path) -> None:
    cluster = make_cluster(17, autovacuum=False, **SUMMARIES)
    make_old(cluster)
    lab, space = start_lab(cluster, lab_directory), lab_directory / "space"
    make_directory(space)
    cluster.execute(f"CREATE TABLESPACE space LOCATION '{space}'")
    fill(cluster, "early", "quiet")
    cluster.execute("ALTER TABLE early SET TABLESPACE space")
    await lab.taker().take(nothing)
    cluster.execute("UPDATE early SET changed = 1 WHERE id % 500 = 0")
    delta = await lab.taker().take(nothing, BackupKind.DELTA)
    expected = rows(cluster)
    cluster.wait_until_archived(cluster.switch_wal())
    assert "pg_tblspc" in cluster.value("SELECT pg_relation_filepath('early')")
    assert member(lab, delta, "early")["IsIncremented"]
    await hydrated(lab, delta.name, lab_directory / "restored", tablespaces={str(space): str(lab_directory / "moved")})
    with running(lab, lab_directory / "restored") as restored:
        assert rows(restored) == expected


@pytest.mark.parametrize("hints", [("off",), ("on",), ("on", "off", "on")], ids=" ".join)
async def test_pages_marked_all_visible_without_an_lsn_go_along(
    hints: Sequence[str], lab_directory: Path, postgres_binaries: FindBinaries
) -> None:
    """Without the mark in the page, index-only scans of the restored server would return what it deletes.

    hints: what wal_log_hints is when the parent is taken, in between when VACUUM runs, and when the delta is taken.
    """
    with PostgresCluster(lab_directory / "pg", postgres_binaries(15)) as cluster:
        cluster.initdb(segment_megabytes=1, checksums=False)
        cluster.configure(fsync=False, wal_level="replica", autovacuum=False, wal_log_hints=hints[0])
        make_old(cluster)
        lab = start_lab(cluster, lab_directory)
        fill(cluster, "early", "quiet")
        cluster.execute("VACUUM quiet")
        await lab.taker(deltas=DELTAS).take(nothing)
        log_hints(cluster, *hints[1:2])
        cluster.execute("VACUUM early", "UPDATE quiet SET changed = 1 WHERE id = 5")
        log_hints(cluster, *hints[2:])
        delta = await lab.taker(deltas=DELTAS).take(nothing)
        cluster.wait_until_archived(cluster.switch_wal())
        assert member(lab, delta, "quiet")["IsIncremented"]
        await require_scans_to_see_what_is_deleted(lab, delta, lab_directory / "restored")


def log_hints(cluster: PostgresCluster, *setting: str) -> None:
    """Restart the server with this wal_log_hints, if one is given."""
    for value in setting:
        cluster.stop()
        cluster.configure(wal_log_hints=value)
        cluster.start()


async def require_scans_to_see_what_is_deleted(lab: BackupLab, backup: Backup, directory: Path) -> None:
    """Restore `backup` and delete of "early" there, whose pages are all-visible: an index-only scan must miss it."""
    await hydrated(lab, backup.name, directory)
    with running(lab, directory) as restored:
        restored.execute(f"DELETE FROM early WHERE id > {ROWS // 2}")
        with restored.connect() as session:
            session.execute("SET enable_seqscan = off")
            session.execute("SET enable_bitmapscan = off")
            assert session.execute("SELECT count(*) FROM early WHERE id > 0").fetchall() == [(ROWS // 2,)]


async def test_without_checksums_nothing_builds_on_a_delta_of_wal_gs(
    lab_directory: Path, postgres_binaries: FindBinaries
) -> None:
    """Nor on a later delta that does: what the first lacks, with hints not logged by then, is missing in all."""
    with PostgresCluster(lab_directory / "pg", postgres_binaries(15)) as cluster:
        cluster.initdb(segment_megabytes=1, checksums=False)
        cluster.configure(fsync=False, wal_level="replica", wal_log_hints="off")
        lab = start_lab(cluster, lab_directory)
        await lab.taker().take(nothing)
        first = await lab.taker(deltas=DELTAS).take(nothing)
        log_hints(cluster, "on")
        second = await lab.taker(deltas=DELTAS).take(nothing)
        assert (second.parent, second.delta_count) == (first.name, 2)
        (lab.store.root / manifest_key(first.name)).unlink()  # theirs have none
        with pytest.raises(BackupFailed, match=f"{first.name} is a delta of WAL-G's"):
            await lab.taker(deltas=DELTAS).take(nothing, BackupKind.DELTA)
        full = await lab.taker(deltas=DELTAS).take(nothing)
        assert not full.is_delta
        (lab.store.root / manifest_key(full.name)).unlink()
        assert (await lab.taker(deltas=DELTAS).take(nothing)).parent == full.name


@needs_walg_buckets
async def test_a_delta_builds_on_what_wal_g_stored(
    lab_directory: Path, hook_directory: Path, postgres_binaries: FindBinaries, pitr: RunPitr
) -> None:
    point = recovery_points("pg17-zstd-delta", reachable=True)[-1]
    settings = restore_settings(point, lab_directory, hook_directory, postgres_binaries(17))
    done = await asyncio.to_thread(pitr, "restore", settings=settings)
    assert done.returncode == 0, done.stderr
    with PostgresCluster(lab_directory / "restored", postgres_binaries(17)) as cluster:
        make_old(cluster)  # as on a standby that was there before, promoted now
        (cluster.data_directory / "postgresql.auto.conf").write_text("")
        store = RecordingStore(lab_directory / "bucket")
        wal = store.root / "wal_005"
        history = (cluster.data_directory / "pg_wal/00000002.history").read_bytes()
        (wal / "00000002.history").write_bytes(history)  # archiving was off when the server was promoted
        cluster.configure(archive_mode="on", archive_command=f"cp %p {wal}/%f", autovacuum=False, restore_command="")
        hand_over(lab_directory / "bucket")
        cluster.start()
        lab = BackupLab(cluster, store)
        cluster.execute("UPDATE t_same SET id = id + 1000000 WHERE id % 100 = 0")
        before = answers(cluster, point)
        delta = await lab.taker(deltas=DELTAS).take(nothing)
        cluster.wait_until_archived(cluster.switch_wal())
        cluster.stop()
        assert (delta.parent, delta.delta_count) == (point.expected["nearest_backup"], 3)
        kinds = [file["IsIncremented"] for file in document(lab, files_metadata_key(delta.name))["Files"].values()]
        assert sum(kinds) > 100
    await hydrated(lab, delta.name, lab_directory / "again")
    with running(lab, lab_directory / "again") as restored:
        assert answers(restored, point) == before
