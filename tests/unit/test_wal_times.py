"""What is found from both ends of a segment is what reading all of it finds, or nothing is told."""

import random
import struct
from collections.abc import Iterator
from functools import cache

from hypothesis import given, settings
from hypothesis.strategies import integers, lists, one_of, sampled_from, tuples

from agent.domain.wal import MAGIC_BY_MAJOR, WAL_PAGE_BYTES, is_segment_size
from agent.domain.wal_scan import scan_segment
from agent.domain.wal_times import SegmentTimes, TransactionEnd, segment_times
from agent.repository.keys import WAL_FOLDER
from tests.support.object_formats import PLAIN, unpack
from tests.support.wal_damage import Damage, copy_a_page, cut_to_zeros, damaged, flip, overwrite
from tests.support.wal_writer import RM_HEAP, RM_XACT, SEGMENT_BYTES, WalWriter
from tests.support.walg_buckets import BUCKETS, needs_walg_buckets

WAL_TIME = 848_000_000_000_000
SEGMENT_16_MB = 16 << 20
NONE = SegmentTimes(None, None)


def ends_of(segment: bytes) -> list[TransactionEnd]:
    """All transactions' ends that a full scan finds whole in the segment."""
    return [
        TransactionEnd(record.lsn, record.time)
        for record in scan_segment(segment).records
        if record.ends_transaction and record.time is not None
    ]


def by_full_scan(segment: bytes) -> SegmentTimes | None:
    if not scan_segment(segment).is_whole:
        return None
    ends = ends_of(segment)
    return SegmentTimes(ends[0], ends[-1]) if ends else NONE


Step = tuple[str, int]
STEPS = [
    "filler",
    "filler",
    "filler",
    "commit",
    "abort",
    "prepared",
    "restore point",
    "switch",
    "given up",
    "lookalike",
]
SIZES = one_of(integers(0, 300), integers(8_000, 8_400), integers(0, 400_000))


def write(writer: WalWriter, step: str, size: int) -> None:
    match step:
        case "filler":
            writer.filler(size)
        case "commit":  # with size // 4 subtransactions
            writer.transaction(0x00, 700, WAL_TIME + writer.lsn, rest=struct.pack("<II", 2, size // 4) + bytes(size))
        case "abort":
            writer.transaction(0x20, 700, WAL_TIME + writer.lsn)
        case "prepared":
            writer.transaction(0x30, 700, WAL_TIME + writer.lsn)
        case "restore point":
            writer.restore_point("before the drop", WAL_TIME)
        case "switch":
            writer.switch()
        case "given up":
            writer.give_up_record(WAL_PAGE_BYTES + size)
        case "lookalike":  # an assignment of subtransactions, and a commit inside other data
            writer.record(RM_XACT, 0x50, bytes(size))
            writer.record(RM_HEAP, 0x00, bytes(size % 8) + a_commit())


@cache
def a_commit() -> bytes:
    writer = WalWriter()
    begin, end = writer.transaction(0x00, 700, WAL_TIME)
    return writer.segments()[0][begin - SEGMENT_BYTES : end - SEGMENT_BYTES]


@settings(max_examples=150)
@given(sampled_from(sorted(MAGIC_BY_MAJOR)), lists(tuples(sampled_from(STEPS), SIZES), max_size=25))
def test_both_ends_tell_what_a_full_scan_tells(major: int, steps: list[Step]) -> None:
    writer = WalWriter(major=major)
    for step, size in steps:
        write(writer, step, size)
    writer.filler(SEGMENT_BYTES)  # so that the last segment but one is full
    for segment in writer.segments():
        assert segment_times(segment) == by_full_scan(segment)


@given(integers(0, 600))
def test_a_commit_at_the_end_of_a_page_counts_and_one_at_the_end_of_the_segment_counts_for_neither(shift: int) -> None:
    writer = WalWriter()
    writer.filler(8 * shift)
    while writer.lsn < 2 * SEGMENT_BYTES + 4 * WAL_PAGE_BYTES:
        writer.transaction(0x00, 700, WAL_TIME + writer.lsn)
        writer.filler(SEGMENT_BYTES // 2 - 3 * WAL_PAGE_BYTES)
        for _ in range(6):
            writer.filler(8_120 - 8 * (shift % 10))
            writer.transaction(0x20, 701, WAL_TIME + writer.lsn)
    for segment in writer.segments():
        assert segment_times(segment) == by_full_scan(segment)


def test_a_commit_across_two_segments_counts_for_neither() -> None:
    writer = WalWriter()
    first = writer.transaction(0x00, 700, WAL_TIME)
    writer.filler(SEGMENT_BYTES - WAL_PAGE_BYTES)
    commit = writer.transaction(0x00, 701, WAL_TIME + 1, rest=struct.pack("<II", 2, 2_000) + bytes(8_000))
    assert commit[0] < 2 * SEGMENT_BYTES < commit[1]
    last = writer.transaction(0x00, 702, WAL_TIME + 2)
    writer.switch()
    before, after = map(segment_times, writer.segments())
    assert [by_lsn(before), by_lsn(after)] == [(first[0], first[0]), (last[0], last[0])]


def by_lsn(times: SegmentTimes | None) -> tuple[int, int] | None:
    return (times.first.lsn, times.last.lsn) if times and times.first and times.last else None


def test_a_segment_in_which_no_transaction_ends_is_told_from_one_that_was_not_searched() -> None:
    writer = WalWriter()
    writer.filler(100)
    writer.switch()
    (switched,) = writer.segments()
    assert segment_times(switched) == NONE
    assert segment_times(switched[: -SEGMENT_BYTES // 2]) is None
    cut = WalWriter()
    cut.transaction(0x00, 700, WAL_TIME)
    assert segment_times(cut.segments()[0]) is None, "WAL that ends without a switch is not a finished segment"


def test_a_search_among_lookalikes_is_given_up() -> None:
    writer = WalWriter(SEGMENT_16_MB, segment_bytes=SEGMENT_16_MB)
    lookalike = bytes(3) + a_commit()  # at a place where a record could begin
    while writer.lsn < 2 * SEGMENT_16_MB:
        writer.record(RM_HEAP, 0x00, lookalike * 20)
    segment = writer.segments()[0]
    assert by_full_scan(segment) == NONE
    assert segment_times(segment) is None


@cache
def busy_segment() -> bytes:
    """16 MB as pgbench writes them, with full-page images now and then."""
    chance = random.Random(7)
    writer = WalWriter(SEGMENT_16_MB, segment_bytes=SEGMENT_16_MB, major=17)
    while writer.lsn < 2 * SEGMENT_16_MB:
        for size in (100, 72, 70, 64, chance.choice((30, 150, 8_000))):
            writer.record(RM_HEAP, 0x00, chance.randbytes(size))
        writer.transaction(chance.choice((0x00, 0x00, 0x20)), 700, WAL_TIME + writer.lsn)
    return writer.segments()[0]


def test_a_busy_segment_of_16_mb_is_told_without_reading_its_middle() -> None:
    segment = busy_segment()
    assert len(ends_of(segment)) > 5_000
    assert segment_times(segment) == by_full_scan(segment)
    middle = range(1 << 20, 15 << 20, WAL_PAGE_BYTES)
    headers_only = b"".join(segment[at : at + 24].ljust(WAL_PAGE_BYTES, b"\0") for at in middle)
    hollow = segment[: 1 << 20] + headers_only + segment[15 << 20 :]
    assert segment_times(hollow) == by_full_scan(segment)


@cache
def small_busy_segment() -> bytes:
    writer = WalWriter()
    while writer.lsn < 2 * SEGMENT_BYTES:
        writer.filler(600)
        writer.transaction(0x00, 700, WAL_TIME + writer.lsn)
    return writer.segments()[0]


PLACES = one_of(
    integers(0, 1_000), integers(8_180, 9_000), integers(SEGMENT_BYTES - 9_000, SEGMENT_BYTES - 1), integers(0, 999_999)
)


@settings(max_examples=200)
@given(lists(tuples(sampled_from([flip, overwrite, cut_to_zeros, copy_a_page]), PLACES, integers(1, 255)), max_size=4))
def test_damage_never_makes_up_a_time(damage: list[Damage]) -> None:
    times = segment_times(damaged(small_busy_segment(), damage))
    real = ends_of(small_busy_segment())
    if times is not None:
        assert times.first in real
        assert times.last in real
    if not damage:
        assert times == SegmentTimes(real[0], real[-1])


def test_an_unknown_version_tells_nothing() -> None:
    content = bytearray(small_busy_segment())
    content[0] ^= 0xFF
    assert segment_times(bytes(content)) is None


def walg_segments() -> Iterator[str]:
    """Names of the plain WAL segments that WAL-G stored: bucket and object."""
    for path in sorted(BUCKETS.glob(f"*/bucket/{WAL_FOLDER}*")):
        if len(path.stem) == 24 and path.suffix != ".json" and "libsodium" not in path.parts[-4]:
            yield str(path.relative_to(BUCKETS))


@needs_walg_buckets
def test_the_segments_of_real_servers_tell_what_a_full_scan_tells() -> None:
    told = []
    for name in walg_segments():
        path = BUCKETS / name
        segment = unpack(PLAIN, path.name, path.read_bytes())
        assert is_segment_size(len(segment)), name
        told.append(segment_times(segment))
        assert told[-1] == by_full_scan(segment), name
    assert len(told) > 90
    assert sum(times is not None for times in told) > 90
