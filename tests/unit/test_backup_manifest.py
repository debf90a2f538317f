"""A backup manifest is what PostgreSQL's documentation says, and stays so when an entry is replaced."""

import hashlib
import json
import os
from contextlib import suppress
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.backup_file import PackedFile
from agent.errors import RepositoryCorrupt
from agent.repository.backup_manifest import ManifestDocument, ManifestReader, file_line, rewritten
from agent.restore.manifest import Manifest

names = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.binary(min_size=1).map(os.fsdecode))
files = st.builds(
    PackedFile,
    names.map(lambda name: f"/{name}"),
    st.integers(-1, 1 << 62),
    file_bytes=st.integers(0, 1 << 50),
    crc32c=st.none() | st.integers(0, (1 << 32) - 1),
)


def manifest(listed: list[PackedFile], version: int = 180000, **contents: bytes) -> bytes:
    document = ManifestDocument()
    document.add(listed)
    for path, content in contents.items():
        document.add_content(path, content)
    chunks = document.chunks(
        pg_version=version, system_identifier=7, timeline=2, start_lsn=0x1_00000028, stop_lsn=0x1_00000130
    )
    made = b"".join(chunks)
    document.close()
    return made


def read(made: bytes) -> dict[str, Any]:
    """Parse a manifest after checking its own checksum as PostgreSQL does."""
    checked, _, _ = made[:-1].rpartition(b"\n")
    value: dict[str, Any] = json.loads(made)
    assert value["Manifest-Checksum"] == hashlib.sha256(checked + b"\n").hexdigest()
    assert made.endswith(b"\n")
    return value


@given(st.lists(files, max_size=5), st.sampled_from([160000, 180000]))
def test_every_file_is_listed_with_size_and_checksum(listed: list[PackedFile], version: int) -> None:
    value = read(manifest(listed, version))
    assert value["PostgreSQL-Backup-Manifest-Version"] == (2 if version >= 170000 else 1)
    assert value.get("System-Identifier") == (7 if version >= 170000 else None)
    assert value["WAL-Ranges"] == [{"Timeline": 2, "Start-LSN": "1/28", "End-LSN": "1/130"}]
    for entry, file in zip(value["Files"], listed, strict=True):
        path = entry["Path"] if "Path" in entry else os.fsdecode(bytes.fromhex(entry["Encoded-Path"]))
        assert (path, entry["Size"]) == (file.name.lstrip("/"), file.file_bytes)
        crc32c = entry.get("Checksum")
        assert file.crc32c == (None if crc32c is None else int.from_bytes(bytes.fromhex(crc32c), "little"))


def test_directories_are_not_listed() -> None:
    assert read(manifest([PackedFile("/base", 0, is_directory=True)]))["Files"] == []


def test_a_checksum_is_written_as_the_server_writes_it() -> None:
    (entry,) = read(manifest([], tablespace_map=b"123456789"))["Files"]
    assert entry == {
        "Path": "tablespace_map", "Size": 9, "Last-Modified": "1970-01-01 00:00:00 GMT",
        "Checksum-Algorithm": "CRC32C", "Checksum": "839206e3",
    }  # fmt: skip
    assert google_crc32c.value(b"123456789") == 0xE3069283


@given(st.lists(files, max_size=3), st.binary(), st.booleans())
def test_a_replaced_entry_makes_the_manifest_that_the_other_content_would_have(
    listed: list[PackedFile], content: bytes, is_last: bool
) -> None:
    others: dict[str, Any] = {} if is_last else {"other": b""}
    before = manifest(listed, backup_label=b"START", **others)
    after = b"".join(rewritten(before.splitlines(keepends=True), {"backup_label": content, "absent": b""}))
    read(after)
    assert after == manifest(listed, backup_label=content, **others)


NASTY = [
    b"NaN", b"1e999", b"1.5", b"-1", b"9" * 5000, b"1" + b"0" * 18, b"null", b"[" * 100_000, b'{"a":' * 100_000, b"[]",
    b'"x"', b'"00"',
]  # fmt: skip


@pytest.mark.parametrize("value", NASTY, ids=[f"{value[:8].decode()} of {len(value)}" for value in NASTY])
@pytest.mark.parametrize("name", [b"Path", b"Encoded-Path", b"Size", b"Checksum", b"Checksum-Algorithm"])
def test_a_line_with_nonsense_is_read_or_refused(name: bytes, value: bytes) -> None:
    values = {b"Path": b'"base/1"', b"Size": b"3", b"Checksum-Algorithm": b'"CRC32C"', b"Checksum": b'"00000000"'}
    values |= {name: value}
    order = [b"Encoded-Path", *values] if name == b"Encoded-Path" else list(values)
    line = b"{ %s },\n" % b", ".join(b'"%s": %s' % (each, values[each]) for each in dict.fromkeys(order))
    with suppress(RepositoryCorrupt):
        Manifest("KEY", [line])
    with suppress(RepositoryCorrupt):
        assert [entry.path for entry in ManifestReader("KEY").take(line)] in (["base/1"], ["x"], ["00"], ["\0"])


@pytest.mark.parametrize("digits", [19, 30, 5000])
def test_a_size_that_no_file_has_is_refused(digits: int) -> None:
    line = file_line("base/1", 3, 0, 0).replace(b'"Size": 3', b'"Size": ' + b"9" * digits) + b",\n"
    with pytest.raises(RepositoryCorrupt, match="KEY"):
        Manifest("KEY", [line])
    with pytest.raises(RepositoryCorrupt, match="KEY"):
        list(ManifestReader("KEY").take(line))
