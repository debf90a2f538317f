"""A tar is read as it arrives; what is not one whole archive is refused."""

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis.strategies import binary, booleans, builds, integers, lists, sampled_from, text

from agent.environment import Secret
from agent.errors import RepositoryCorrupt
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_reader import Member, MemberKind, TarParser, path_below, plain_member, read_tar
from agent.settings import Compression
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import KEY as CIPHER_KEY

KEY = "basebackups_005/base_X/tar_partitions/part_001.tar"


class Collector:
    """A `MemberSink` that keeps everything."""

    def __init__(self) -> None:
        self.members: list[tuple[Member, bytes]] = []
        self._content = bytearray()
        self._member: Member | None = None

    def begin(self, member: Member) -> None:
        assert self._member is None
        self._member = member

    def write(self, data: memoryview) -> None:
        self._content += data

    def end(self) -> None:
        assert self._member is not None
        self.members.append((self._member, bytes(self._content)))
        self._member, self._content = None, bytearray()


def member(name: str, content: bytes, *, directory: bool = False) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    info.size = 0 if directory else len(content)
    info.mode = 0o700 if directory else 0o600
    return info, b"" if directory else content


MEMBERS = lists(
    builds(
        member,
        text("abc/éü ", min_size=1, max_size=300).map(lambda name: f"/{name.strip('/ ')}"),
        binary(max_size=1500),
        directory=booleans(),
    ),
    max_size=6,
)
FORMATS = sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return body.getvalue()


def parse(content: bytes, cuts: list[int] | None = None) -> list[tuple[Member, bytes]]:
    sink = Collector()
    parser = TarParser(KEY, sink)
    bounds = [0, *sorted(cut for cut in cuts or [] if cut < len(content)), len(content)]
    for start, stop in pairwise(bounds):
        parser.take(content[start:stop])
    parser.finish()
    return sink.members


@given(MEMBERS, FORMATS, lists(integers(0, 20_000), max_size=8))
def test_members_come_out_as_they_went_in_however_they_arrive(
    members: list[tuple[tarfile.TarInfo, bytes]], form: int, cuts: list[int]
) -> None:
    try:
        content = archive(members, form)
    except ValueError:  # the name does not fit a USTAR header
        content = archive(members)
    found = [(m.name.rstrip("/"), m.kind, m.mode, m.size, data) for m, data in parse(content, cuts)]
    assert found == [
        (i.name.rstrip("/"), MemberKind.DIRECTORY if i.isdir() else MemberKind.FILE, i.mode, i.size, data)
        for i, data in members
    ]


@given(
    text("abc/éü. ", min_size=1, max_size=110),
    integers(0, 0o7777),
    integers(0, 1 << 40),
    booleans(),
    lists(integers(0, 511), max_size=2),
    sampled_from(b"\0 08x\x80"),
)
def test_a_plain_header_says_what_python_reads_in_it_or_is_left_to_python(
    name: str, mode: int, size: int, directory: bool, flips: list[int], value: int
) -> None:
    info, _ = member(name, b"", directory=directory)
    info.mode, info.size = mode, 0 if directory else size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    for place in flips:
        header[place] = value
    plain = plain_member(bytes(header))
    if not flips and len(name.encode()) <= 100 and not (directory and size) and size < 8**11:
        assert plain is not None
    if plain is not None:
        read = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
        assert (plain.name, plain.mode, plain.size) == (read.name, read.mode & 0o7777, read.size)
        assert (plain.kind is MemberKind.FILE, plain.kind is MemberKind.DIRECTORY) == (read.isreg(), read.isdir())


def test_a_header_with_its_name_in_two_fields_is_left_to_python() -> None:
    info = tarfile.TarInfo(f"/base/{'d' * 60}/{'f' * 60}")
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == 512
    assert plain_member(header) is None


@given(text("ab./", max_size=12))
def test_a_name_becomes_a_path_below_the_directory_or_is_refused(name: str) -> None:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        with pytest.raises(RepositoryCorrupt):
            path_below(name, KEY)
    else:
        assert path_below(name, KEY) == "/".join(parts)


def test_links_and_devices_are_told_apart() -> None:
    link = tarfile.TarInfo("/pg_wal")
    link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere"
    device = tarfile.TarInfo("/null")
    device.type = tarfile.CHRTYPE
    assert [m.kind for m, _ in parse(archive([(link, b""), (device, b"")]))] == [MemberKind.OTHER] * 2


GOOD = archive([member("/PG_VERSION", b"15\n"), member("/base/1/1259", bytes(range(256)) * 40)])


def longer(content: bytes) -> bytes:
    return content + b"x"


def flipped_header(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def sparse(content: bytes) -> bytes:
    info = tarfile.TarInfo("/sparse")
    info.pax_headers = {"GNU.sparse.major": "1"}
    return archive([(info, b"")]) + content


def endless(content: bytes) -> bytes:
    info = tarfile.TarInfo("/endless")
    info.pax_headers = {"size": "9" * 5000}
    return archive([(info, b"")]) + content


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda content: content[:1000], "cut short"),
        (lambda content: content[:512], "cut short"),
        (lambda content: content[: 512 * 2], "cut short"),
        (lambda _: b"", "cut short"),
        (longer, "goes on after its end"),
        (lambda content: content + GOOD, "goes on after its end"),
        (flipped_header, "is damaged"),
        (sparse, "not understood"),
        (endless, "not understood"),
    ],
)
def test_what_is_not_one_whole_archive_is_refused(break_it: Callable[[bytes], bytes], said: str) -> None:
    with pytest.raises(RepositoryCorrupt, match=said) as refused:
        parse(break_it(GOOD))
    assert KEY in refused.value.message


@given(binary(max_size=3000), integers(0, 1000))
def test_no_bytes_at_all_break_the_parser(noise: bytes, at: int) -> None:
    content = bytearray(GOOD)
    content[at : at + len(noise)] = noise
    with suppress(RepositoryCorrupt):
        parse(bytes(content))


@pytest.mark.parametrize("key", [None, CIPHER_KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("compression", Compression)
async def test_an_object_is_decoded_and_read_in_pieces(compression: Compression, key: Secret[bytes] | None) -> None:
    objects = ObjectFormat(compression, key)
    store, sink = MemoryObjectStore(), Collector()
    seen: list[int] = []
    big = archive([member("/base/1/1", bytes(range(256)) * 20_000), member("/PG_VERSION", b"15\n")])
    stored = objects.encode(big)
    await store.put(KEY + objects.extension, stored)
    await read_tar(store, KEY + objects.extension, objects, sink, seen.append)
    assert [(m.name, len(content)) for m, content in sink.members] == [("/base/1/1", 256 * 20_000), ("/PG_VERSION", 3)]
    assert sum(seen) == len(stored)


@pytest.mark.parametrize("cipher_key", [None, CIPHER_KEY], ids=["plain", "encrypted"])
async def test_an_object_that_is_absent_or_cut_short_is_refused_by_name(cipher_key: Secret[bytes] | None) -> None:
    objects, store = ObjectFormat(Compression.ZSTD, cipher_key), MemoryObjectStore()
    key = KEY + objects.extension
    with pytest.raises(RepositoryCorrupt, match=f"{key} is missing"):
        await read_tar(store, key, objects, Collector(), lambda _: None)
    packed = objects.encode(GOOD)
    for body in (packed[:-1], packed[:20], b"", objects.encode(GOOD[:512]), packed + b"x"):
        await store.put(key, body)
        with pytest.raises(RepositoryCorrupt, match=key):
            await read_tar(store, key, objects, Collector(), lambda _: None)
