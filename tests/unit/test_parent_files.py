"""The parent's file list is understood as it arrives, whatever its size, and refused unless it is whole."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import dictionaries, integers, lists, none, text

from agent.domain.backup_file import PackedFile
from agent.errors import RepositoryCorrupt
from agent.repository.backup_documents import FilesMetadataDocument
from agent.repository.keys import files_metadata_key
from agent.repository.parent_files import FilesReader, ParentFiles, read_parent_files
from agent.storage.memory import MemoryObjectStore

NAME = "base_000000010000000000000003"
KEY = files_metadata_key(NAME)


async def parsed(body: bytes) -> ParentFiles | None:
    store = MemoryObjectStore()
    await store.put(KEY, body)
    return await read_parent_files(store, NAME)


@given(dictionaries(text(max_size=8), integers(0, 2**62) | none()), text(max_size=8))
def test_each_file_is_found_with_its_time(files: dict[str, int | None], other: str) -> None:
    known = ParentFiles()
    for name, mtime_ns in files.items():
        known.add(name, mtime_ns)
    known.seal()
    assert {name: known.mtime_ns(name) for name in files} == files
    assert (other in known) == (other in files)


@given(dictionaries(text(max_size=8), integers(0, 9)), integers(1, 40), integers(0, 3))
def test_entries_are_the_same_however_the_document_arrives(files: dict[str, int], size: int, indent: int) -> None:
    document = {"Files": {name: {"MTime": str(value), "x": {"y": [1]}} for name, value in files.items()}, "rest": [1]}
    body = json.dumps(document, indent=indent or None, ensure_ascii=not indent).encode("utf-8", "surrogatepass")
    reader = FilesReader(KEY)
    found: dict[str, Any] = {}
    for start in range(0, len(body), size):
        found.update(reader.take(body[start : start + size]))
    reader.finish()
    assert found == document["Files"]


_AWKWARD = text(alphabet='a/,"{}[]:\\ é', max_size=6)


@given(dictionaries(_AWKWARD, _AWKWARD), dictionaries(_AWKWARD, lists(_AWKWARD)), integers(1, 60), integers(0, 1))
def test_names_that_look_like_the_end_of_something_are_read_like_others(
    files: dict[str, str], tars: dict[str, list[str]], size: int, indent: int
) -> None:
    described = {name: {"MTime": value} for name, value in files.items()}
    body = json.dumps(
        {"Files": described, "TarFileSets": tars}, indent=indent or None, separators=(",", ":") if not indent else None
    ).encode()
    members: list[tuple[str, str]] = []
    reader = FilesReader(KEY, lambda tar, name: members.append((tar, name)))
    found = [entry for start in range(0, len(body), size) for entry in reader.take(body[start : start + size])]
    reader.finish()
    assert found == list(described.items())
    assert members == [(tar, name) for tar, names in tars.items() for name in names]


async def test_what_we_write_is_understood() -> None:
    document = FilesMetadataDocument()
    document.add_tar("part_001.tar.zst", [PackedFile("/base/1/1259", 1_700_000_000_123_456_789), PackedFile("/é", 5)])
    files = await parsed(b"".join(document.chunks()))
    document.close()
    assert files is not None
    assert (files.mtime_ns("/base/1/1259"), files.mtime_ns("/é")) == (1_700_000_000_123_456_789, 5)
    assert len(files) == 2


async def test_a_file_with_damaged_pages_is_nothing_to_build_on() -> None:
    damaged = {"CorruptBlocksCount": 1, "SomeCorruptBlocks": [7]}
    time = {"MTime": "2026-01-01T00:00:00Z"}
    files = {"/base/1/1": {**time, "CorruptBlocks": damaged}, "/base/1/2": {**time, "CorruptBlocks": None}}
    found = await parsed(json.dumps({"Files": files}).encode())
    assert found is not None
    assert ("/base/1/1" in found, "/base/1/2" in found) == (False, True)


async def test_a_time_that_64_bits_do_not_hold_is_none() -> None:
    times = {"/a": "2262-04-12T00:00:00Z", "/b": "1677-09-20T00:00:00Z", "/c": "2262-04-11T00:00:00Z"}
    files = await parsed(json.dumps({"Files": {name: {"MTime": time} for name, time in times.items()}}).encode())
    assert files is not None
    assert [files.mtime_ns(name) is None for name in times] == [True, True, False]
    assert all(name in files for name in times)


async def test_no_list_is_an_answer() -> None:
    assert await read_parent_files(MemoryObjectStore(), NAME) is None
    empty = await parsed(b'{"TarFileSets": {"Files": ["a"]}}')
    assert empty is not None
    assert len(empty) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"Files": {"/a": {"MTime": "2026-01-01T00:00:00Z"}',
        b'{"Files": {"/a": {"MTime": "yesterday"}}}',
        b'{"Files": {"/a": 5}}',
        b'{"Files": {"\xff": {}}}',
        b'{"Files": {' + b"x" * (5 << 20),
        b'{"Files": {"/a": ' + b"[" * 100_000,
        b'{"Files": {"/a": ' + b'{"a":' * 100_000,
        b'{"Fi\\qles": {}}',
    ],
    ids=lambda body: body[:20],
)
async def test_a_list_that_is_not_whole_is_refused(body: bytes) -> None:
    with pytest.raises(RepositoryCorrupt, match="files_metadata"):
        await parsed(body)
