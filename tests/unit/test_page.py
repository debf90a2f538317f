"""Checksums of many pages at once are PostgreSQL's, and wrong pages are told from new, later and half-written ones."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.backup.delta_files import Increment
from agent.domain.backup_file import CorruptBlocks
from agent.domain.control_file import parse_control_file
from agent.domain.page import PAGE_BYTES, wrong_pages
from agent.errors import BackupFailed
from agent.postgres.data_files import DataFile, relation_file_number
from agent.postgres.file_content import WholeFile, WholeFiles
from agent.postgres.page_check import PageCheck, PageRules
from tests.support.pages import make_page, plain_checksum
from tests.support.postgres import MakeCluster

START = 0x2000028
EMPTY = bytes(PAGE_BYTES)


RULES = PageRules(START, 131072)


def is_wrong(page: bytes, block: int, start_lsn: int) -> bool:
    """Tell it of one page, plainly."""
    high, low, checksum, _, _, upper = struct.unpack_from("<IIHHHH", page)
    if not upper:
        return any(page)
    return bool((high << 32 | low) < start_lsn) and checksum != plain_checksum(page, block)


@st.composite
def any_page(draw: st.DrawFn, block: int) -> bytes:
    """Draw a page of any content, whose checksum is right, or nearly, or not at all."""
    page = bytearray((draw(st.binary(min_size=1, max_size=64)) * PAGE_BYTES)[:PAGE_BYTES])
    if draw(st.booleans()):
        page[:8] = struct.pack("<II", draw(st.integers(0, 2)), draw(st.integers(0, (1 << 32) - 1)))
    if draw(st.booleans()):
        page[14:16] = b"\0\0"
    page[8:10] = plain_checksum(bytes(page), block).to_bytes(2, "little")
    if draw(st.booleans()):
        page[draw(st.integers(0, PAGE_BYTES - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(page)


@given(st.data(), st.integers(0, (1 << 32) - 8), st.integers(0, (1 << 34)) | st.just((1 << 64) - 1))
def test_of_many_pages_those_are_wrong_that_are_by_themselves(data: st.DataObject, first: int, start_lsn: int) -> None:
    pages = [data.draw(any_page(first + number)) for number in range(data.draw(st.integers(0, 4)))]
    expected = [number for number, page in enumerate(pages) if is_wrong(page, first + number, start_lsn)]
    rest = data.draw(st.binary(max_size=100))
    assert wrong_pages(b"".join([*pages, rest]), first, start_lsn) == expected


@pytest.mark.parametrize("major", [13, 18])
def test_the_checksums_that_a_server_wrote_are_right(major: int, make_cluster: MakeCluster) -> None:
    cluster, checked = make_cluster(major), 0
    control = parse_control_file((cluster.data_directory / "global" / "pg_control").read_bytes(), google_crc32c.value)
    assert control.data_checksums
    for path in cluster.data_directory.rglob("*"):
        if path.is_file() and relation_file_number(f"/{path.relative_to(cluster.data_directory)}") is not None:
            pages = path.read_bytes()
            if pages:
                assert wrong_pages(pages, 0, (1 << 64) - 1) == [], path
                checked += len(pages) // PAGE_BYTES
    assert checked > 500


def test_a_page_is_wrong_if_it_is_old_and_its_checksum_does_not_fit() -> None:
    damaged = make_page(1)[:-1] + b"\0"
    later = make_page(2, lsn=START)[:-1] + b"\0"
    half_initialised = EMPTY[:-1] + b"x"
    pages = make_page(0) + damaged + later + EMPTY + half_initialised
    assert wrong_pages(pages, 0, START) == [1, 4]
    assert wrong_pages(pages, 1, START) == [0, 1, 4]  # the block number is part of the checksum


def test_scattered_pages_are_verified_each_as_the_block_that_it_is(tmp_path: Path) -> None:
    path = tmp_path / "16384"
    pages = [make_page(block) for block in range(30)]
    pages[12] = pages[12][:-1] + b"x"
    path.write_bytes(b"".join(pages))
    descriptor = os.open(path, os.O_RDONLY)
    blocks = [1, 3, 4, 11, 12, 13, 20, 29]
    increment = Increment(descriptor, path.stat(), blocks, PageCheck(RULES, str(path), descriptor, 0))
    stored = b"".join(increment.pieces())
    increment.close()
    assert stored.endswith(b"".join(pages[block] for block in blocks))
    assert increment.corrupt == CorruptBlocks(1, (12,))


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("/base/5/1259", 0), ("/base/5/1259_fsm", 0), ("/base/5/16384.12", 12), ("/base/5/16384_vm.1", 1),
        ("/global/1260", 0), ("/pg_tblspc/16390/PG_15_202209061/5/16391.2", 2), ("/base/5/16384_init", 0),
        ("/base/5/PG_VERSION", None), ("/global/pg_filenode.map", None), ("/base/5/t3_16384", None),
        ("/pg_xact/0000", None), ("/pg_multixact/members/0000", None), ("/16384", None),
    ],
)  # fmt: skip
def test_relation_files_are_told_by_their_names(name: str, segment: int | None) -> None:
    assert relation_file_number(name) == segment


@contextmanager
def checking(path: Path) -> Iterator[PageCheck]:
    with path.open("rb") as file:
        yield PageCheck(RULES, str(path), file.fileno(), 0)


def test_a_page_read_half_written_is_read_again(tmp_path: Path) -> None:
    whole = make_page(3, fill=b"new" * 2000)
    torn = make_page(3, fill=b"old" * 2000)[:4096] + whole[4096:]
    (tmp_path / "f").write_bytes(make_page(0) * 3 + whole)
    assert torn != whole
    with checking(tmp_path / "f") as check:
        assert check.verified(EMPTY + torn + EMPTY, 2 * PAGE_BYTES) == EMPTY + whole + EMPTY
        assert check.corrupt.count == 0


def test_a_page_that_the_file_lost_meanwhile_is_not_corrupt(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with checking(tmp_path / "f") as check:
        assert check.verified(make_page(0)[:-1] + b"\0", 0) == EMPTY
        assert check.corrupt.count == 0


def test_corrupt_pages_are_stored_as_they_are_counted_and_some_named(tmp_path: Path) -> None:
    pages = [make_page(131072 + block, fill=b"%d" % block) for block in range(300)]
    for block in range(100, 140):
        pages[block] = pages[block][:-1] + b"?"
    content = b"".join(pages) + b"no page"
    (tmp_path / "f.1").write_bytes(content)
    name = "/base/5/16384.1"
    file = WholeFiles(RULES).open(DataFile(name, str(tmp_path / "f.1"), os.lstat(tmp_path / "f.1")))
    assert isinstance(file, WholeFile)
    assert b"".join(file.pieces()) == content
    file.close()
    assert file.corrupt.count == 40
    assert file.corrupt.some == tuple(range(100, 110))


def test_what_is_no_relation_file_is_not_checked(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * PAGE_BYTES)
    file = WholeFiles(RULES).open(DataFile("/base/5/pg_filenode.map", str(tmp_path / "f"), os.lstat(tmp_path / "f")))
    assert file is not None
    assert len(b"".join(file.pieces())) == PAGE_BYTES
    assert file.corrupt.count == 0
    file.close()


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to(tmp_path / "f")
    with pytest.raises(BackupFailed, match="cannot be read"):
        WholeFiles(None).open(DataFile("/base/5/1", str(tmp_path / "f"), os.lstat(tmp_path)))
