"""The catalog says what WAL-G says of the same repository, and refuses what it cannot understand by name."""

import json
import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agent.domain.lsn import parse_lsn
from agent.errors import RepositoryCorrupt
from agent.repository.backups import (
    list_tars,
    owner_by_backups,
    read_backup,
    read_catalog,
    read_sentinel,
)
from agent.repository.documents import parse_document, parse_moment
from agent.repository.keys import metadata_key, sentinel_key
from agent.repository.parent_files import file_flags
from agent.storage.directory import DirectoryObjectStore
from agent.storage.memory import MemoryObjectStore
from tests.support.repository import read_files_metadata

BUCKETS = Path(__file__).parents[2] / "../shared/walg-buckets"
needs_buckets = pytest.mark.skipif(not BUCKETS.is_dir(), reason="no repositories written by WAL-G beside this checkout")
REPOSITORIES = [
    "pg13-lz4-16mb",
    "pg15-libsodium-hex",
    "pg15-lz4-full",
    "pg15-lzma",
    "pg15-timelines",
    "pg16-tablespaces",
    "pg17-zstd-delta",
]
NAME = "base_000000010000000000000009"
SENTINEL = {"LSN": 0x900028, "FinishLSN": 0x900100, "PgVersion": 150020, "SystemIdentifier": 1 << 63, "Version": 2}
METADATA = {"start_time": "2026-11-22T20:00:00Z", "finish_time": "2026-11-22T20:01:00.5Z", "is_permanent": True}


def expectations(repository: str) -> Any:
    return json.loads((BUCKETS / repository / "expected.json").read_text())


@pytest.fixture(params=REPOSITORIES)
def written_by_wal_g(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DirectoryObjectStore, str]:
    """A repository written by WAL-G, its objects as old as they were, and its name."""
    if not BUCKETS.is_dir():
        pytest.skip("no repositories written by WAL-G beside this checkout")
    shutil.copytree(BUCKETS / request.param / "bucket", tmp_path / "bucket", copy_function=shutil.copyfile)
    for entry in expectations(request.param)["objects"]:
        os.utime(tmp_path / "bucket" / entry["key"], ns=(entry["modified_ns"], entry["modified_ns"]))
    return DirectoryObjectStore(tmp_path / "bucket"), request.param


async def test_the_catalog_agrees_with_wal_gs_list(written_by_wal_g: tuple[DirectoryObjectStore, str]) -> None:
    store, repository = written_by_wal_g
    listed = json.loads((BUCKETS / repository / "backup-list.json").read_text())
    catalog = await read_catalog(store)
    assert [backup.name for backup in catalog] == [entry["backup_name"] for entry in listed]
    for backup, entry in zip(catalog, listed, strict=True):
        assert abs(backup.modified_at - parse_moment(entry["time"])) <= timedelta(microseconds=1)
        assert backup.start_time == parse_moment(entry["start_time"])
        assert backup.finish_time == parse_moment(entry["finish_time"])
        assert (backup.start_lsn, backup.finish_lsn) == (entry["start_lsn"], entry["finish_lsn"])
        assert (backup.pg_version, backup.permanent) == (entry["pg_version"], entry["is_permanent"])
        assert backup.system_identifier == entry["system_identifier"]
        assert (backup.size_bytes, backup.stored_bytes) == (entry["uncompressed_size"], entry["compressed_size"])
        assert backup.start_segment == entry["wal_file_name"]


async def test_each_backup_is_what_the_server_knew(written_by_wal_g: tuple[DirectoryObjectStore, str]) -> None:
    store, repository = written_by_wal_g
    for expected in expectations(repository)["backups"]:
        name = expected["name"]
        backup, sentinel = await read_backup(store, name), await read_sentinel(store, name)
        files = await read_files_metadata(store, name)
        assert backup is not None
        assert backup.is_delta == (expected["kind"] == "delta")
        assert (backup.parent, backup.full) == (expected["parent"], expected["full"])
        assert (backup.delta_count, backup.timeline) == (expected["delta_count"], expected["timeline"])
        assert backup.start_lsn == parse_lsn(expected["start_lsn"])
        assert sentinel.tablespaces == {entry["oid"]: entry["location"] for entry in expected["tablespaces"]}
        assert sentinel.data_directory == expectations(repository)["data_directory"]
        assert not sentinel.files_metadata_disabled
        assert sentinel.embedded_files is None
        flags = [file_flags(name, file, description) for file, description in files["Files"].items()]
        assert len(flags) == expected["files_total"]
        assert sum(is_incremented for is_incremented, _ in flags) == expected["files_incremented"]
        assert sum(is_skipped for _, is_skipped in flags) == expected["files_skipped"]
        tars = {info.key.rpartition("/")[2] for info in await list_tars(store, name)}
        assert tars == set(expected["tar_objects"])
        assert {tar for tar in tars if not tar.startswith("pg_control")} == set(files["TarFileSets"])


async def repository(objects: Mapping[str, Any]) -> MemoryObjectStore:
    """Return a store of `objects`; values that are not bytes are written as JSON."""
    store = MemoryObjectStore()
    for key, value in objects.items():
        await store.put(key, value if isinstance(value, bytes) else json.dumps(value).encode())
    return store


async def test_an_empty_repository_has_an_empty_catalog() -> None:
    store = await repository({})
    assert await read_catalog(store) == []
    assert await read_backup(store, NAME) is None
    assert await owner_by_backups(store) is None


async def test_permanence_and_times_are_those_of_metadata_json() -> None:
    sentinel = {**SENTINEL, "IsPermanent": False, "StartTime": "2020-01-01T00:00:00Z"}
    store = await repository({sentinel_key(NAME): sentinel, metadata_key(NAME): METADATA})
    (backup,) = await read_catalog(store)
    assert backup.permanent
    assert backup.start_time == parse_moment("2026-11-22T20:00:00Z")
    assert backup.finish_time == parse_moment("2026-11-22T20:01:00.500000Z")
    assert backup.system_identifier == 1 << 63


async def test_without_metadata_the_sentinel_speaks_and_then_its_age() -> None:
    store = await repository({sentinel_key(NAME): {**SENTINEL, "FinishTime": "2020-01-01T01:00:00+01:00"}})
    (backup,) = await read_catalog(store)
    assert not backup.permanent
    assert backup.finish_time == parse_moment("2020-01-01T00:00:00Z")
    assert backup.start_time == backup.modified_at


async def test_foreign_sentinels_are_ignored() -> None:
    store = await repository(
        {
            "basebackups_005/mine_backup_stop_sentinel.json": b"?",
            "basebackups_005/x/y.json": b"?",
            "basebackups_005/a": b"",
        }
    )
    assert await read_catalog(store) == []


async def test_a_sentinel_of_the_first_wal_g_lists_its_files_itself() -> None:
    name = "base_00000001000000000000000C_D_000000010000000000000009"
    files = {"/base/1/1": {"IsIncremented": True, "IsSkipped": False, "MTime": "2018-01-01T00:00:00.000000001+03:00"}}
    sentinel = {"LSN": 0xC00028, "FinishLSN": 0xC00100, "DeltaFromLSN": 0x900028, "DeltaFrom": NAME,
                "DeltaFullName": NAME, "DeltaCount": 1, "PgVersion": 90600, "Spec": None, "Files": files}  # fmt: skip
    read = await read_sentinel(await repository({sentinel_key(name): sentinel}), name)
    assert read.delta is not None
    assert (read.delta.parent, read.delta.parent_lsn) == (NAME, 0x900028)
    assert read.embedded_files is not None
    assert read.embedded_files.files["/base/1/1"].is_incremented


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"[]", b"null", b'{"LSN":', b"\xff\xfe{}", b"[" * 100_000, b"9" * 10_000,
        {"LSN": "9437224"}, {"LSN": 9437224.0}, {"LSN": True}, {"LSN": -1}, {"LSN": 1 << 64}, {"LSN": None},
        {"FinishLSN": None}, {"PgVersion": "15"}, {"LSN": 0x100028}, {"DeltaFrom": NAME}, {"DeltaFrom": 1},
        {"Spec": {}, "spec": 1, "LSN": []}, {"Spec": {"base_prefix": "/d", "tablespaces": ["1"]}},
        {"Spec": {"tablespaces": ["1"], "1": {"loc": "relative", "link": "pg_tblspc/1"}}},
        {"Spec": {"tablespaces": ["1"], "1": {"loc": "/a", "link": "../../etc"}}}, {"Spec": {"tablespaces": "1"}},
        {"StartTime": "2026-11-22T20:00:00"}, {"FinishTime": 1}, {"FilesMetadataDisabled": 1}, {"Files": [1]},
        {"Files": {"/x": None}}, {"Files": {"/x": {"IsSkipped": 1}}},
        {"Files": {"/x": {"IsSkipped": True, "IsIncremented": True}}}, {"Files": {}, "LSN": "NaN"},
    ],
    ids=lambda damage: str(damage)[:40],
)  # fmt: skip
async def test_a_sentinel_that_cannot_be_understood_is_refused_by_its_key(damage: bytes | dict[str, Any]) -> None:
    sentinel = damage if isinstance(damage, bytes) else {**SENTINEL, **damage}
    store = await repository({sentinel_key(NAME): sentinel})
    with pytest.raises(RepositoryCorrupt, match=sentinel_key(NAME)):
        await read_catalog(store, strict=True)
    with pytest.raises(RepositoryCorrupt, match=sentinel_key(NAME)):
        await read_backup(store, NAME)


@pytest.mark.parametrize("damage", [b"{", {"start_time": "2026-11-22 20:00"}, {"is_permanent": "yes"}])
async def test_metadata_that_cannot_be_understood_is_refused_by_its_key(damage: bytes | dict[str, Any]) -> None:
    store = await repository({sentinel_key(NAME): SENTINEL, metadata_key(NAME): damage})
    with pytest.raises(RepositoryCorrupt, match=metadata_key(NAME)):
        await read_catalog(store, strict=True)


async def test_a_damaged_backup_is_passed_over_with_a_warning_so_that_the_others_serve() -> None:
    damaged = "base_00000001000000000000000A"
    store = await repository({sentinel_key(NAME): SENTINEL, sentinel_key(damaged): b"{"})
    with capture_logs() as logs:
        assert [backup.name for backup in await read_catalog(store)] == [NAME]
    assert [(entry["log_level"], entry["backup"]) for entry in logs] == [("warning", damaged)]


async def test_a_backup_without_a_sentinel_is_called_incomplete() -> None:
    with pytest.raises(RepositoryCorrupt, match="has no sentinel"):
        await read_sentinel(MemoryObjectStore(), NAME)


async def test_a_document_larger_than_any_is_not_read_to_its_end() -> None:
    store = await repository({sentinel_key(NAME): SENTINEL, metadata_key(NAME): b" " * (5 << 20)})
    with pytest.raises(RepositoryCorrupt, match="is larger than"):
        await read_catalog(store, strict=True)


async def test_a_damaged_newest_backup_does_not_hide_whose_the_repository_is() -> None:
    store = await repository({sentinel_key(NAME): SENTINEL})
    await store.put(sentinel_key(NAME.replace("9", "A")), b"{")
    assert await owner_by_backups(store) == 1 << 63


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_read_or_refused(value: Any) -> None:
    body = json.dumps(value).encode()
    if isinstance(value, dict):
        assert sorted(parse_document("key", body).names()) == sorted(value)
    else:
        with pytest.raises(RepositoryCorrupt, match="key"):
            parse_document("key", body)
