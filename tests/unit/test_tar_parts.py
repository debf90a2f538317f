"""Tar parts are what Python's own reader takes for the files they were made of."""

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.backup_file import MemberKind
from agent.environment import Secret
from agent.errors import BackupFailed, RepositoryCorrupt
from agent.postgres.data_files import DataFile
from agent.postgres.file_content import READ_BYTES, WholeFile, WholeFiles
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_parts import MAX_FILES, TarPart, in_threads, member_header, small_tar
from agent.repository.tar_reader import Member, TarParser
from agent.settings import Compression
from tests.support.base_backup import read_members
from tests.support.object_formats import KEY, PLAIN, ZSTD, unpack

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NO_LIMIT = 1 << 60
WHOLE = WholeFiles(None).open


class Discard:
    """A `MemberSink` that keeps nothing."""

    def begin(self, member: Member) -> None: ...
    def write(self, data: memoryview) -> None: ...
    def end(self) -> None: ...


def data_file(name: str, path: Path) -> DataFile:
    return DataFile(name, str(path), os.lstat(path))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def packed(part: TarPart, files: Iterator[DataFile], threshold: int = NO_LIMIT) -> bytes:
    return b"".join(part.pack(files, threshold))


names = st.one_of(
    st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=150),
    st.binary(min_size=1, max_size=150).map(lambda name: os.fsdecode(name.translate(None, b"/\0")) or "x"),
)


@given(
    name=names.map(lambda name: f"/base/{name}"),
    size=st.one_of(st.integers(0, 1 << 20), st.integers(0, 1 << 45)),
    mode=st.integers(0, 0o7777),
    mtime=st.integers(-(1 << 33), 1 << 40),
    uid=st.integers(0, (1 << 32) - 1),
    is_directory=st.booleans(),
)
def test_a_header_reads_back_as_it_was_meant(
    name: str, size: int, mode: int, mtime: int, uid: int, is_directory: bool
) -> None:
    size = 0 if is_directory else size
    header = member_header(name, size, mode, mtime=mtime, uid=uid, gid=uid, directory=is_directory)
    assert len(header) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024)), mode="r:", ignore_zeros=True) as archive:
        info = archive.next()
    assert info is not None
    assert (info.name, info.size, info.mode, info.mtime, info.uid, info.gid) == (
        name.rstrip("/"), size, mode, mtime, uid, uid,
    )  # fmt: skip
    assert info.isdir() == is_directory
    assert info.isreg() != is_directory


def test_a_short_name_has_a_plain_ustar_header() -> None:
    header = member_header("/base/1/1259", 8192, 0o600, mtime=1795380000)
    assert len(header) == 512
    assert header[257:265] == b"ustar\x0000"


@given(
    name=st.text(st.characters(codec="ascii", exclude_characters="\x00"), min_size=1, max_size=101),
    numbers=st.tuples(*(st.integers(-1, 8**digits + 1) for digits in (7, 7, 7, 11, 11))),
    is_directory=st.booleans(),
)
def test_a_header_is_byte_for_byte_what_python_writes(
    name: str, numbers: tuple[int, int, int, int, int], is_directory: bool
) -> None:
    info = tarfile.TarInfo("x")
    mode, info.uid, info.gid, info.size, info.mtime = numbers
    info.mode = mode & 0o7777
    info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
    info.name = name if not is_directory else name.rstrip("/") or "x"
    made = member_header(
        info.name, info.size, info.mode, mtime=int(info.mtime), uid=info.uid, gid=info.gid, directory=is_directory
    )
    if not is_directory:  # to whose name Python would add a slash
        assert made == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    checksum = sum(made[-512:][:148]) + 8 * 32 + sum(made[-512:][156:])
    assert int(made[-512:][148:154], 8) == checksum


def test_a_directory_has_no_slash_at_its_end() -> None:
    header = member_header("/base", 0, 0o700, directory=True)
    assert header[:7] == b"/base\x00\x00"


def test_a_file_beyond_8_gib_has_its_size_in_a_pax_header() -> None:
    header = member_header("/base/1/1", 9 << 30, 0o600)
    assert b"size=9663676416\n" in header


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("compression", Compression)
def test_files_and_directories_are_packed_with_their_content(
    tmp_path: Path, compression: Compression, key: Secret[bytes] | None
) -> None:
    objects = ObjectFormat(compression, key)
    contents = {"/PG_VERSION": b"15\n", "/base/1/1259": os.urandom(3 << 20), "/base/1/2": b"", "/base/1/é": b"x" * 512}
    (tmp_path / "d").mkdir()
    files = [data_file("/", tmp_path / "d"), data_file("/base", tmp_path / "d")]
    for number, (name, content) in enumerate(contents.items()):
        (tmp_path / str(number)).write_bytes(content)
        files.append(data_file(name, tmp_path / str(number)))
    part = TarPart(f"part_001.tar{objects.extension}", objects, WHOLE)
    members = read_members(part.name, packed(part, iter(files)), objects)
    assert {member.name: member.content for member in members if member.info.isreg()} == contents
    assert [member.name for member in members if member.info.isdir()] == ["/", "/base"]
    assert [(file.name, file.mtime_ns) for file in part.files] == [
        (file.name, os.lstat(file.path).st_mtime_ns) for file in files
    ]
    assert part.content_bytes == part.done_bytes == sum(map(len, contents.values()))
    assert part.catalog_bytes == sum(os.lstat(file.path).st_size for file in files)


def test_of_zstd_each_piece_is_a_frame_and_none_can_be_missed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(3 * READ_BYTES))
    body = packed(TarPart("part_001.tar.zst", ZSTD, WHOLE), iter([data_file("/f", tmp_path / "f")]))
    ends, rest = [0], body
    while rest:
        frame = zstd.ZstdDecompressor()
        frame.decompress(rest)
        rest = frame.unused_data
        ends.append(len(body) - len(rest))
    assert len(ends) > 4
    for end in ends[:-1]:
        parser = TarParser("part_001.tar.zst", Discard())
        parser.take(unpack(ZSTD, "part_001.tar.zst", body[:end]) if end else b"")
        with pytest.raises(RepositoryCorrupt, match="cut short"):
            parser.finish()


def test_only_zeros_follow_the_end_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    archive = packed(TarPart("part_001.tar", PLAIN, WHOLE), iter([data_file("/f", tmp_path / "f")]))
    assert len(archive) == 512 + 512 + 1024
    assert archive[-1024:] == bytes(1024)


def test_a_part_is_closed_after_the_file_that_exceeds_the_threshold(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 100_000)
    files = iter([data_file(f"/{name}", tmp_path / name) for name in "abc"])
    first, second = TarPart("part_001.tar", PLAIN, WHOLE), TarPart("part_002.tar", PLAIN, WHOLE)
    assert [member.name for member in read_members(first.name, packed(first, files, 150_000))] == ["/a", "/b"]
    assert [member.name for member in read_members(second.name, packed(second, files, 150_000))] == ["/c"]


@pytest.mark.parametrize("new_size", [0, 1 << 20, (2 << 20) + 100, 5 << 20])
def test_a_member_is_as_long_as_its_header_says_whatever_becomes_of_the_file(tmp_path: Path, new_size: int) -> None:
    content = os.urandom((3 << 20) + 5)
    (tmp_path / "f").write_bytes(content)
    (tmp_path / "g").write_bytes(b"next")
    part = TarPart("part_001.tar", PLAIN, WHOLE)
    chunks = part.pack(iter([data_file("/f", tmp_path / "f"), data_file("/g", tmp_path / "g")]), NO_LIMIT)
    begun = next(chunks)
    os.truncate(tmp_path / "f", new_size)
    first, second = read_members(part.name, begun + b"".join(chunks))
    assert first.content == content[: max(new_size, READ_BYTES)].ljust(len(content), b"\0")
    assert (second.name, second.content) == ("/g", b"next")


def test_a_file_that_vanished_is_in_no_list(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    gone = data_file("/base/1/1", tmp_path / "f")
    (tmp_path / "f").unlink()
    part = TarPart("part_001.tar", PLAIN, WHOLE)
    assert read_members(part.name, packed(part, iter([gone, data_file("/", tmp_path)])))[0].name == "/"
    assert [file.name for file in part.files] == ["/"]
    assert part.vanished == ["/base/1/1"]


def test_a_file_that_no_restore_can_do_without_must_not_vanish(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"15\n")
    gone = data_file("/PG_VERSION", tmp_path / "f")
    (tmp_path / "f").unlink()
    with pytest.raises(BackupFailed, match="cannot be read: No such file"):
        packed(TarPart("part_001.tar", PLAIN, WHOLE), iter([gone]))


def test_what_is_no_regular_file_any_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    file = data_file("/f", tmp_path / "f")
    (tmp_path / "f").unlink()
    os.mkfifo(tmp_path / "f")
    with pytest.raises(BackupFailed, match="no longer a regular file"):
        packed(TarPart("part_001.tar", PLAIN, WHOLE), iter([file]))


def test_chunks_are_bounded_and_come_soon_however_well_the_content_compresses(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(64 << 20)
    part = TarPart("part_001.tar.zst", ZSTD, WHOLE)
    done, steps = [], 0
    for chunk in part.pack(iter([data_file("/f", tmp_path / "f")]), NO_LIMIT):
        assert len(chunk) <= 5 << 20
        done.append(part.done_bytes)
        steps += 1
    assert steps >= 8
    assert max(after - before for before, after in pairwise(done)) <= 9 << 20


def test_a_small_tar_holds_its_members() -> None:
    body = small_tar({"tablespace_map": b"", "backup_label": b"START\n"}, ZSTD)
    members = read_members("backup_label.tar.zst", body)
    assert [(member.name, member.content) for member in members] == [
        ("tablespace_map", b""),
        ("backup_label", b"START\n"),
    ]


async def test_chunks_made_in_threads_close_the_file_when_the_store_fails(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(4 << 20))
    opened_before = open_files()
    part = TarPart("part_001.tar", PLAIN, WHOLE)
    chunks = in_threads(part.pack(iter([data_file("/f", tmp_path / "f")]), NO_LIMIT))
    async with aclosing(chunks):
        await anext(chunks)
        assert open_files() == opened_before + 1
    assert open_files() == opened_before


def test_a_skipped_file_is_recorded_without_a_member(tmp_path: Path) -> None:
    class Skipped(WholeFile):
        kind = MemberKind.SKIPPED

    def skip(file: DataFile) -> Skipped:
        return Skipped(os.open(file.path, os.O_RDONLY), os.lstat(file.path))

    (tmp_path / "f").write_bytes(b"content")
    part = TarPart("part_001.tar", PLAIN, skip)
    assert read_members(part.name, packed(part, iter([data_file("/f", tmp_path / "f")]))) == []
    assert [(file.name, file.kind, file.file_bytes) for file in part.files] == [("/f", MemberKind.SKIPPED, 7)]
    assert (part.content_bytes, part.done_bytes) == (0, 7)


def test_a_whole_file_is_recorded_with_its_checksum(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 77)
    (tmp_path / "f").write_bytes(content)
    part = TarPart("part_001.tar", PLAIN, WHOLE)
    packed(part, iter([data_file("/f", tmp_path / "f")]))
    assert [(file.file_bytes, file.crc32c) for file in part.files] == [(len(content), google_crc32c.value(content))]


def test_a_part_is_closed_after_very_many_files(tmp_path: Path) -> None:
    files = iter([data_file("/d", tmp_path)] * (MAX_FILES + 1))
    part = TarPart("part_001.tar", PLAIN, WHOLE)
    packed(part, files)
    assert (len(part.files), len(list(files))) == (MAX_FILES, 1)
