"""The documents of a base backup are in WAL-G's form, and our reader reads what our writer wrote."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.domain.backup_file import CorruptBlocks, MemberKind, PackedFile
from agent.repository.backup_documents import (
    BackupFacts,
    FilesMetadataDocument,
    metadata_document,
    sentinel_document,
)
from agent.repository.backups import read_backup, read_sentinel
from agent.repository.documents import parse_nanoseconds
from agent.repository.keys import files_metadata_key, metadata_key, sentinel_key
from agent.repository.parent_files import file_flags
from agent.storage.memory import MemoryObjectStore
from tests.support.repository import read_files_metadata

NAME = "base_000000010000000000000003"


def facts(**changes: Any) -> BackupFacts:
    values: dict[str, Any] = {
        "name": NAME,
        "start_lsn": 0x3000028,
        "finish_lsn": 0x3000100,
        "start_time": datetime(2024, 5, 1, 10, 0, 0, 155306, UTC),
        "finish_time": datetime(2024, 5, 1, 12, 3, 12, tzinfo=timezone(timedelta(hours=2))),
        "pg_version": 150004,
        "system_identifier": 7290000000000000001,
        "size_bytes": 34307630,
        "stored_bytes": 6798264,
        "catalog_bytes": 34426295,
        "hostname": "pg-0",
        "data_directory": "/pgdata",
        "tablespaces": {},
    }
    return BackupFacts(**{**values, **changes})


def test_the_sentinel_is_compact_json_with_utc_times_of_six_digits() -> None:
    assert sentinel_document(facts(tablespaces={16384: "/tbs/ä"})).decode() == (
        '{"LSN":50331688,"PgVersion":150004,"FinishLSN":50331904,"SystemIdentifier":7290000000000000001,'
        '"UncompressedSize":34307630,"CompressedSize":6798264,"DataCatalogSize":34426295,'
        '"Spec":{"base_prefix":"/pgdata","tablespaces":["16384"],"16384":{"loc":"/tbs/ä","link":"pg_tblspc/16384"}},'
        '"ChkpNum":null,"Version":2,"StartTime":"2024-05-01T10:00:00.155306Z",'
        '"FinishTime":"2024-05-01T10:03:12.000000Z","DateFmt":"%Y-%m-%dT%H:%M:%S.%fZ","Hostname":"pg-0",'
        '"DataDir":"/pgdata","IsPermanent":false,"PitrCorruptPages":0}'
    )


def test_without_tablespaces_there_is_no_spec() -> None:
    assert "Spec" not in json.loads(sentinel_document(facts()))


lsns = st.integers(0x3000000, 0x3FFFFFF)


@given(lsns, lsns, st.integers(1, (1 << 64) - 1), st.datetimes(min_value=datetime(1990, 1, 1)))  # noqa: DTZ001
def test_a_backup_reads_back_as_it_was_written(start: int, finish: int, identifier: int, moment: datetime) -> None:
    written = facts(
        start_lsn=start, finish_lsn=finish, system_identifier=identifier, start_time=moment.replace(tzinfo=UTC),
        tablespaces={16384: "/a b", 16385: "/ü\n"}, corrupt_pages=start % 3, libc="2.36",
        config_outside=("/etc/ä/postgresql.conf",),
    )  # fmt: skip

    async def read() -> None:
        store = MemoryObjectStore()
        await store.put(sentinel_key(NAME), sentinel_document(written))
        await store.put(metadata_key(NAME), metadata_document(written))
        backup, sentinel = await read_backup(store, NAME), await read_sentinel(store, NAME)
        assert backup is not None
        expected = written.backup()
        for name in expected.__slots__:
            if name != "modified_at":
                assert getattr(backup, name) == getattr(expected, name)
        assert sentinel.tablespaces == written.tablespaces

    asyncio.run(read())


names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.binary(max_size=20).map(os.fsdecode)
)
members = st.lists(st.builds(PackedFile, names, st.integers(0, 1 << 62), st.sampled_from(MemberKind)), max_size=8)


@given(st.dictionaries(names, members, max_size=4))
def test_the_list_of_files_reads_back_with_its_nanoseconds(tars: dict[str, list[PackedFile]]) -> None:
    async def read() -> None:
        store = MemoryObjectStore()
        await store.put(files_metadata_key(NAME), content_of(tars))
        files = await read_files_metadata(store, NAME)
        listed_files = {
            name: (parse_nanoseconds(file["MTime"]), *file_flags(NAME, name, file))
            for name, file in files["Files"].items()
        }
        assert listed_files == {
            file.name: (file.mtime_ns, file.kind is MemberKind.INCREMENT, file.kind is MemberKind.SKIPPED)
            for listed in tars.values()
            for file in listed
        }
        assert files["TarFileSets"] == {
            tar: [file.name for file in listed if file.kind is not MemberKind.SKIPPED] for tar, listed in tars.items()
        }

    asyncio.run(read())


def content_of(tars: dict[str, list[PackedFile]]) -> bytes:
    document = FilesMetadataDocument()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(document.add_tar, tars.keys(), tars.values()))
    content = b"".join(document.chunks())
    document.close()
    return content


def test_the_label_files_are_listed_in_their_set_only() -> None:
    document = FilesMetadataDocument()
    document.add_tar("part_001.tar.zst", [PackedFile("/", 1795379903_248889689)])
    document.add_label_tar("backup_label.tar.zst")
    assert json.loads(b"".join(document.chunks())) == {
        "Files": {
            "/": {
                "IsIncremented": False,
                "IsSkipped": False,
                "MTime": "2026-11-22T20:38:23.248889689Z",
                "UpdatesCount": 0,
            }
        },
        "TarFileSets": {"part_001.tar.zst": ["/"], "backup_label.tar.zst": ["tablespace_map", "backup_label"]},
    }
    document.close()


def test_corrupt_blocks_are_counted_and_some_of_them_named() -> None:
    document = FilesMetadataDocument()
    document.add_tar("part_001.tar", [PackedFile("/base/1/2", 0, corrupt=CorruptBlocks(12, (3, 4)))])
    (entry,) = json.loads(b"".join(document.chunks()))["Files"].values()
    assert entry["CorruptBlocks"] == {"CorruptBlocksCount": 12, "SomeCorruptBlocks": [3, 4]}
    document.close()


def test_a_list_of_very_many_files_is_kept_on_disk_and_handed_out_in_pieces() -> None:
    document = FilesMetadataDocument()
    for part in range(20):
        document.add_tar(f"part_{part}", [PackedFile(f"/base/5/{part}_{number}", number) for number in range(5000)])
    chunks = list(document.chunks())
    assert max(map(len, chunks)) <= 1 << 20
    assert len(json.loads(b"".join(chunks))["Files"]) == 100_000
    document.close()
