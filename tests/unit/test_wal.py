import struct

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers, sampled_from

from agent.domain.lsn import parse_lsn
from agent.domain.wal import (
    MAGIC_BY_MAJOR,
    WalFileKind,
    archive_order,
    is_segment_size,
    parse_segment_header,
    parse_segment_name,
    segment_name,
    segment_problem,
    segments_between,
    wal_file_kind,
)

SEGMENT_SIZES = [1 << exponent for exponent in range(20, 31)]
MIB = 1 << 20


def header(
    name: str,
    segment_bytes: int = MIB,
    *,
    magic: int = MAGIC_BY_MAJOR[15],
    info: int = 2,
    system_identifier: int = 7,
    timeline: int | None = None,
) -> bytes:
    own_timeline, address = parse_segment_name(name, segment_bytes)
    fields = (magic, info, timeline or own_timeline, address, 0, system_identifier, segment_bytes, 8192)
    return struct.pack("<HHIQI4xQII", *fields)


@given(integers(1, 2**32 - 1), integers(0, 2**64 - 1), sampled_from(SEGMENT_SIZES))
def test_a_segment_name_parses_back_to_the_start_of_its_segment(timeline: int, lsn: int, segment_bytes: int) -> None:
    name = segment_name(timeline, lsn, segment_bytes)
    assert parse_segment_name(name, segment_bytes) == (timeline, lsn - lsn % segment_bytes)


@pytest.mark.parametrize(
    ("size", "last"), [(MIB, "00000FFF"), (16 * MIB, "000000FF"), (64 * MIB, "0000003F"), (1024 * MIB, "00000003")]
)
@given(integers(1, 2**32 - 1), integers(0, 2**32 - 2))
def test_after_the_last_segment_of_a_log_comes_the_first_of_the_next(
    size: int, last: str, timeline: int, log: int
) -> None:
    ended = f"{timeline:08X}{log:08X}{last}"
    begun = f"{timeline:08X}{log + 1:08X}00000000"
    stop_lsn = (log + 1 << 32) + 1
    assert segments_between(timeline, stop_lsn - 2, stop_lsn, size) == [ended, begun]


# What pg_walfile_name of PostgreSQL 18 says, for segments of 1, 16, 64 and 1024 MiB.
VECTORS = {
    "0/1000000": ("0000000000000010", "0000000000000001", "0000000000000000", "0000000000000000"),
    "0/FFFFFFFF": ("0000000000000FFF", "00000000000000FF", "000000000000003F", "0000000000000003"),
    "1/0": ("0000000100000000", "0000000100000000", "0000000100000000", "0000000100000000"),
    "A9/65000000": ("000000A900000650", "000000A900000065", "000000A900000019", "000000A900000001"),
    "FF/FFFFFFFF": ("000000FF00000FFF", "000000FF000000FF", "000000FF0000003F", "000000FF00000003"),
}


@pytest.mark.parametrize(("lsn", "names"), VECTORS.items())
def test_segments_are_named_as_postgresql_names_them(lsn: str, names: tuple[str, ...]) -> None:
    sizes = (MIB, 16 * MIB, 64 * MIB, 1024 * MIB)
    assert tuple(segment_name(1, parse_lsn(lsn), size)[8:] for size in sizes) == names


def test_a_segment_number_beyond_its_log_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot exist"):
        parse_segment_name("000000010000000000000100", 16 * MIB)


@given(integers(0, 2**40), integers(1, 2**27), sampled_from(SEGMENT_SIZES[:5]))
def test_segments_between_cover_every_byte_once(start: int, length: int, segment_bytes: int) -> None:
    names = segments_between(3, start, start + length, segment_bytes)
    starts = [parse_segment_name(name, segment_bytes)[1] for name in names]
    assert starts == list(range(starts[0], starts[-1] + 1, segment_bytes))
    assert starts[0] <= start < starts[0] + segment_bytes
    assert starts[-1] < start + length <= starts[-1] + segment_bytes


def test_a_stop_on_a_boundary_does_not_need_the_segment_that_begins_there() -> None:
    assert segments_between(1, 0x100028, 0x200000, MIB) == ["000000010000000000000001"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("0000000100000000000000A1", WalFileKind.SEGMENT),
        ("0000000100000000000000A1.partial", WalFileKind.PARTIAL),
        ("00000002.history", WalFileKind.HISTORY),
        ("0000000100000000000000A1.00000028.backup", WalFileKind.BACKUP_HISTORY),
        ("0000000100000000000000a1", None),
        ("0000000100000000000000A1\n", None),
        ("0000000100000000000000A", None),
        ("0000000100000000000000A11", None),
        ("../00000100000000000000A1", None),
        ("00000002.history.lz4", None),
        ("", None),
    ],
)
def test_only_the_four_kinds_of_wal_file_are_known(name: str, kind: WalFileKind | None) -> None:
    assert wal_file_kind(name) is kind


def test_history_files_are_archived_first() -> None:
    names = ["000000010000000000000002", "000000020000000000000001", "00000002.history", "000000010000000000000001"]
    assert sorted(names, key=archive_order) == [names[2], names[3], names[0], names[1]]


@given(integers(0, 1 << 32))
def test_segment_sizes_are_powers_of_two_in_range(size: int) -> None:
    assert is_segment_size(size) == (size in SEGMENT_SIZES)


NAME = "00000002000000000000000A"


def test_a_segment_with_the_right_header_has_no_problem() -> None:
    assert segment_problem(NAME, MIB, header(NAME), 7) is None


def test_a_segment_may_begin_with_a_page_of_the_timeline_it_left() -> None:
    assert segment_problem(NAME, MIB, header(NAME, timeline=1), 7) is None


@pytest.mark.parametrize(
    ("size", "head", "says"),
    [
        (MIB - 1, header(NAME), "1048575 bytes"),
        (MIB, header(NAME, system_identifier=8), "database cluster 8"),
        (MIB, header("00000002000000000000000B"), "begins at"),
        (MIB, header(NAME, timeline=3), "timeline 3"),
        (MIB, header(NAME, magic=0xD061), "D061"),
        (MIB, header(NAME, info=0), "no long header"),
        (MIB, bytes(64), "no long header"),
        (10, b"short", "has no header"),
    ],
)
def test_a_segment_that_is_not_what_its_name_says_is_named_for_it(size: int, head: bytes, says: str) -> None:
    assert says in (segment_problem(NAME, size, head, 7) or "")


@given(binary(max_size=80))
def test_any_bytes_are_a_header_or_a_value_error(head: bytes) -> None:
    try:
        parse_segment_header(head)
    except ValueError:
        return
    assert len(head) >= 40
