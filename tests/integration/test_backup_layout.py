"""A base backup of a busy server is laid out as WAL-G writes it, and PostgreSQL recovers from it."""

import asyncio
import json
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.domain.backup_label import parse_backup_label
from agent.domain.catalog import Backup
from agent.domain.wal import segments_between
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_temporary_directory
from agent.lab.waiting import wait_until
from agent.repository.backups import list_tars, read_backup, read_catalog, read_sentinel
from agent.repository.keys import (
    backup_folder,
    files_metadata_key,
    manifest_key,
    metadata_key,
    sentinel_key,
    tar_folder,
)
from tests.support.base_backup import BackupLab, Member, extract, read_members, rows_changing, start_lab
from tests.support.postgres import FindBinaries

MICROSECONDS_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
SEGMENT_BYTES = 1 << 20


@dataclass
class Taken:
    """A base backup, what was stored of it, and what the data directory held."""

    lab: BackupLab
    backup: Backup
    stored: list[str]
    members: list[Member]
    directories: set[str]
    quiet_file: Path

    def document(self, key: str) -> Any:
        return json.loads((self.lab.store.root / key).read_bytes())

    @property
    def label(self) -> bytes:
        return next(member.content for member in self.members if member.name == "backup_label")


@pytest.fixture(scope="module", params=[13, 15, 18])
def taken(request: pytest.FixtureRequest, postgres_binaries: FindBinaries) -> Iterator[Taken]:
    """A backup of each version, taken while rows, tables and databases come and go."""
    directory = make_temporary_directory("pitr-test-")
    cluster = PostgresCluster(directory / "pg", postgres_binaries(request.param))
    try:
        with cluster:
            cluster.initdb(segment_megabytes=1)
            cluster.configure(fsync=False, max_connections=20)
            lab = start_lab(cluster, directory)
            quiet_file = prepare(cluster)
            with rows_changing(cluster):
                backup = asyncio.run(lab.taker().take(lab.progress.append))
            cluster.execute("INSERT INTO kept SELECT generate_series(1001, 2000)")
            cluster.wait_until_archived(cluster.switch_wal())
            cluster.stop()
            yield look(lab, backup, quiet_file)
    finally:
        shutil.rmtree(directory)


def prepare(cluster: PostgresCluster) -> Path:
    """Fill the database; return a file of it that nobody changes."""
    cluster.execute(
        "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS id",
        "CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000) AS id",
        "SELECT pg_create_physical_replication_slot('slot', true)",
        "CHECKPOINT",
    )
    (cluster.data_directory / "backup_label.old").write_text("of another backup")
    (cluster.data_directory / "empty").mkdir()
    quiet_file = cluster.data_directory / ("quiet" + "y" * 120 + "é")
    quiet_file.write_bytes(b"content")
    hand_over(cluster.data_directory / "empty")
    hand_over(quiet_file)
    return quiet_file


def look(lab: BackupLab, backup: Backup, quiet_file: Path) -> Taken:
    root = lab.cluster.data_directory
    tars = [key for key in lab.store.stored if key.startswith(tar_folder(backup.name))]
    members = [
        member
        for key in tars
        for member in read_members(key.removeprefix(tar_folder(backup.name)), (lab.store.root / key).read_bytes())
    ]
    directories = {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_dir()}
    return Taken(lab, backup, list(lab.store.stored), members, directories, quiet_file)


def test_the_name_is_the_start_segment_in_upper_case(taken: Taken) -> None:
    label = parse_backup_label(taken.label.decode())
    assert taken.backup.start_lsn == label.start_lsn


def test_objects_are_stored_in_wal_gs_order_and_the_sentinel_last(taken: Taken) -> None:
    name, folder = taken.backup.name, tar_folder(taken.backup.name)
    parts = [key for key in taken.stored if key.startswith(folder + "part_")]
    assert len(parts) > 1
    assert taken.stored == [
        *parts,
        folder + "pg_control.tar.zst",
        folder + "backup_label.tar.zst",
        manifest_key(name),
        metadata_key(name),
        files_metadata_key(name),
        sentinel_key(name),
    ]
    assert sorted(parts) == [f"{folder}part_{number:03d}.tar.zst" for number in range(1, len(parts) + 1)]


def test_nothing_else_is_in_the_backups_folder(taken: Taken) -> None:
    stored = {key for key in taken.lab.store.keys() if key.startswith("basebackups_005/")}  # noqa: SIM118 - a method
    assert stored == set(taken.stored)
    assert all(
        key == sentinel_key(taken.backup.name) or key.startswith(backup_folder(taken.backup.name)) for key in stored
    )


def test_the_sentinel_has_every_field_that_wal_g_writes(taken: Taken) -> None:
    sentinel = taken.document(sentinel_key(taken.backup.name))
    of_wal_g = {name: type(value) for name, value in sentinel.items() if not name.startswith("Pitr")}
    assert of_wal_g == {
        "LSN": int, "PgVersion": int, "FinishLSN": int, "SystemIdentifier": int, "UncompressedSize": int,
        "CompressedSize": int, "DataCatalogSize": int, "ChkpNum": type(None), "Version": int, "StartTime": str,
        "FinishTime": str, "DateFmt": str, "Hostname": str, "DataDir": str, "IsPermanent": bool,
    }  # fmt: skip
    assert sentinel["Version"] == 2
    assert sentinel["DateFmt"] == "%Y-%m-%dT%H:%M:%S.%fZ"
    assert sentinel["DataDir"] == str(taken.lab.cluster.data_directory)
    assert MICROSECONDS_UTC.fullmatch(sentinel["StartTime"])
    assert MICROSECONDS_UTC.fullmatch(sentinel["FinishTime"])


def test_metadata_has_the_twelve_mandatory_keys_and_agrees_with_the_sentinel(taken: Taken) -> None:
    sentinel = taken.document(sentinel_key(taken.backup.name))
    metadata = taken.document(metadata_key(taken.backup.name))
    assert metadata == {
        "start_time": sentinel["StartTime"],
        "finish_time": sentinel["FinishTime"],
        "date_fmt": sentinel["DateFmt"],
        "hostname": sentinel["Hostname"],
        "data_dir": sentinel["DataDir"],
        "pg_version": sentinel["PgVersion"],
        "start_lsn": sentinel["LSN"],
        "finish_lsn": sentinel["FinishLSN"],
        "is_permanent": False,
        "system_identifier": sentinel["SystemIdentifier"],
        "uncompressed_size": sentinel["UncompressedSize"],
        "compressed_size": sentinel["CompressedSize"],
    }


def test_sizes_are_those_of_the_tars(taken: Taken) -> None:
    sentinel, root = taken.document(sentinel_key(taken.backup.name)), taken.lab.store.root
    tars = [root / key for key in taken.stored if "/tar_partitions/" in key]
    assert sentinel["CompressedSize"] == sum(path.stat().st_size for path in tars)
    assert sentinel["UncompressedSize"] == sum(member.info.size for member in taken.members)
    assert sentinel["DataCatalogSize"] > sentinel["UncompressedSize"]


def test_the_files_listed_are_the_members_of_the_parts_no_more_and_no_less(taken: Taken) -> None:
    files = taken.document(files_metadata_key(taken.backup.name))["Files"]
    in_parts = [member.name for member in taken.members if member.tar.startswith("part_")]
    assert sorted(files) == sorted(in_parts)
    assert all(
        (entry["IsIncremented"], entry["IsSkipped"], entry["UpdatesCount"]) == (False, False, 0)
        for entry in files.values()
    )


def test_the_tar_file_sets_name_every_member_but_pg_control(taken: Taken) -> None:
    sets = taken.document(files_metadata_key(taken.backup.name))["TarFileSets"]
    expected: dict[str, list[str]] = {}
    for member in taken.members:
        if not member.tar.startswith("pg_control"):
            expected.setdefault(member.tar, []).append(member.name)
    assert {tar: sorted(names) for tar, names in sets.items()} == {
        tar: sorted(names) for tar, names in expected.items()
    }


def test_a_files_time_is_recorded_to_the_nanosecond(taken: Taken) -> None:
    files = taken.document(files_metadata_key(taken.backup.name))["Files"]
    seconds, nanoseconds = divmod(taken.quiet_file.stat().st_mtime_ns, 10**9)
    moment = datetime.fromtimestamp(seconds, UTC)
    assert files[f"/{taken.quiet_file.name}"]["MTime"] == f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def test_pages_that_change_while_they_are_read_are_not_called_corrupt(taken: Taken) -> None:
    assert taken.backup.corrupt_pages == 0
    assert "CorruptBlocks" not in (taken.lab.store.root / files_metadata_key(taken.backup.name)).read_text()


def test_member_names_begin_with_a_slash_but_for_the_label_files(taken: Taken) -> None:
    for member in taken.members:
        assert member.name.startswith("/") == (member.name not in ("backup_label", "tablespace_map"))
        assert member.info.isreg() or member.info.isdir()
    assert [member.name for member in taken.members if member.tar == "pg_control.tar.zst"] == ["/global/pg_control"]
    labels = [member for member in taken.members if member.tar == "backup_label.tar.zst"]
    assert {member.name for member in labels} == {"backup_label", "tablespace_map"}
    assert all((member.info.mode, member.info.mtime, member.info.uid) == (0o600, 0, 0) for member in labels)


def test_no_member_is_there_twice(taken: Taken) -> None:
    assert len({member.name for member in taken.members}) == len(taken.members)


def test_every_directory_has_a_header_even_an_empty_or_emptied_one(taken: Taken) -> None:
    stored = {member.name for member in taken.members if member.info.isdir()}
    assert {"/", "/empty", "/pg_wal", "/pg_wal/archive_status", "/pg_replslot", "/pg_notify"} <= stored
    gone_since = {
        name for name in taken.directories - stored if re.match(r"/(base|pg_tblspc|pg_replslot|pg_wal)/", name)
    }
    assert taken.directories - gone_since <= stored


def test_what_postgresql_leaves_out_is_left_out(taken: Taken) -> None:
    names = {member.name for member in taken.members if member.info.isreg()}
    emptied = (
        "pg_wal",
        "pg_replslot",
        "pg_notify",
        "pg_dynshmem",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
    )
    assert not [name for name in names if name.startswith(tuple(f"/{folder}/" for folder in emptied))]
    left_out = ("postmaster.pid", "postmaster.opts", "backup_label.old", "pg_internal.init")
    assert not [name for name in names if name.rpartition("/")[2] in left_out]


def test_an_unlogged_table_is_only_its_init_fork(taken: Taken) -> None:
    names = {member.name for member in taken.members}
    init_forks = {name for name in names if name.endswith("_init")}
    assert len(init_forks) == 1
    assert not {name.removesuffix("_init") for name in init_forks} & names


def test_the_files_of_a_quiet_server_are_stored_byte_for_byte(taken: Taken) -> None:
    (quiet,) = (member for member in taken.members if member.name == f"/{taken.quiet_file.name}")
    assert quiet.content == taken.quiet_file.read_bytes()
    assert quiet.info.mtime == int(taken.quiet_file.stat().st_mtime)
    assert quiet.info.mode == stat.S_IMODE(taken.quiet_file.stat().st_mode)


def test_all_wal_from_start_to_stop_and_the_backup_history_file_are_archived(taken: Taken) -> None:
    backup = taken.backup
    archived = {path.name for path in (taken.lab.store.root / "wal_005").iterdir()}
    segments = segments_between(backup.timeline, backup.start_lsn, backup.finish_lsn, SEGMENT_BYTES)
    assert set(segments) <= archived
    assert f"{segments[0]}.{backup.start_lsn % SEGMENT_BYTES:08X}.backup" in archived


def test_our_own_reader_finds_the_same_backup(taken: Taken) -> None:
    async def read() -> None:
        store, name = taken.lab.store, taken.backup.name
        backup = await read_backup(store, name)
        assert backup is not None
        assert await read_catalog(store) == [backup]
        assert abs(backup.modified_at - taken.backup.modified_at) < timedelta(minutes=1)
        assert {**vars_of(backup), "modified_at": None} == {**vars_of(taken.backup), "modified_at": None}
        sentinel = await read_sentinel(store, name)
        assert sentinel.tablespaces == {}
        assert sentinel.delta is None
        tars = {info.key.rpartition("/")[2] for info in await list_tars(store, name)}
        assert tars == {member.tar for member in taken.members}

    asyncio.run(read())


def vars_of(backup: Backup) -> dict[str, Any]:
    return {name: getattr(backup, name) for name in Backup.__slots__}


def test_progress_reaches_the_whole(taken: Taken) -> None:
    stages = [progress.stage for progress in taken.lab.progress]
    assert list(dict.fromkeys(stages)) == ["waiting for a checkpoint", "copying files", "waiting for WAL"]
    copying = [progress for progress in taken.lab.progress if progress.stage == "copying files"]
    assert [progress.done for progress in copying] == sorted(progress.done for progress in copying)
    assert copying[-1].ratio == 1.0
    assert taken.lab.progress[-1].ratio == 1.0


def test_postgresql_recovers_from_it_to_the_end_of_the_archive(taken: Taken) -> None:
    directory = make_temporary_directory("pitr-test-")
    original = taken.lab.cluster
    try:
        with PostgresCluster(directory / "pg", original.binaries) as restored:
            extract(taken.members, restored.data_directory)
            (restored.data_directory / "recovery.signal").touch()
            hand_over(restored.data_directory)
            wal = taken.lab.store.root / "wal_005"
            restored.configure(restore_command=f"cp {wal}/%f %p", archive_mode="off")
            restored.start()
            wait_until(lambda: not restored.value("SELECT pg_is_in_recovery()"), seconds=60, what="promotion")
            assert restored.value("SELECT count(*) FROM kept") == 2000
            assert restored.value("SELECT count(*) FROM unlogged") == 0
            assert restored.value("SELECT count(*) FROM pg_replication_slots") == 0
            rows, changes = restored.query("SELECT count(*), sum(changed) FROM busy")[0]
            assert rows % 50 == 0
            assert rows > 0
            assert changes > 0
            restored.execute("REINDEX DATABASE postgres")
    finally:
        shutil.rmtree(directory)
