"""Damaged WAL that nothing else proves is told from good WAL, and from WAL that ends."""

import pytest
from hypothesis import given, settings
from hypothesis.strategies import DataObject, data, integers, lists, one_of, sampled_from

from agent.domain.wal import MAGIC_BY_MAJOR, WAL_PAGE_BYTES
from agent.domain.wal_check import CheckedSegment, RecordCheck, continuation_problem, wal_ends_in
from tests.support.wal_writer import SEGMENT_BYTES, WalWriter

SIZES = one_of(integers(0, 300), integers(7_900, 8_400), integers(0, 60_000))


def check(content: bytes, step: int = 1 << 20) -> CheckedSegment:
    walk = RecordCheck()
    for start in range(0, len(content), step):
        walk.take(content[start : start + step])
    return walk.finish()


def problems(segments: list[bytes]) -> list[str]:
    """Say what is wrong with segments that are handed out one after the other, as recovery asks for them."""
    found: list[str] = []
    before: CheckedSegment | None = None
    for number, content in enumerate(segments):
        try:
            segment = check(content)
        except ValueError as error:
            return [*found, str(error)]
        if before is not None and (problem := continuation_problem(before, segment)) is not None:
            found.append(problem)
        if wal_ends_in(before, segment) and number < len(segments) - 1:
            found.append("it ends")
        before = segment
    return found


def written(sizes: list[int], *, major: int = 15, segments: int = 1) -> WalWriter:
    """Return at least `segments` of WAL with records of these sizes, over and over, and the start of another."""
    writer = WalWriter(major=major)
    while writer.lsn < (1 + segments) * SEGMENT_BYTES + WAL_PAGE_BYTES:
        for size in [*sizes, 1000]:
            writer.filler(size)
    return writer


@settings(max_examples=15, deadline=None)
@given(lists(SIZES, max_size=5), sampled_from(sorted(MAGIC_BY_MAJOR)), integers(1, 1 << 20))
def test_good_wal_of_every_version_is_good_however_it_is_cut(sizes: list[int], major: int, step: int) -> None:
    segments = written(sizes, major=major).segments()
    assert problems(segments) == []
    assert check(segments[0], max(step, 1000)) == check(segments[0])


@settings(max_examples=30, deadline=None)
@given(lists(SIZES, max_size=5), data())
def test_a_flipped_bit_never_passes_for_good_wal(sizes: list[int], draw: DataObject) -> None:
    segments = written(sizes, segments=2).segments()[:3]
    whole = bytearray(b"".join(segments))
    bit = draw.draw(integers(8 * WAL_PAGE_BYTES, 8 * 2 * SEGMENT_BYTES - 1))
    whole[bit // 8] ^= 1 << bit % 8
    damaged = [bytes(whole[i : i + SEGMENT_BYTES]) for i in range(0, len(whole), SEGMENT_BYTES)]
    assert problems(damaged) or means_nothing(segments, bit)


def means_nothing(segments: list[bytes], bit: int) -> bool:
    """Whether a bit is one that recovery does not read: padding, or a page's timeline and flags of no account."""
    whole = b"".join(segments)
    byte = bit // 8 % WAL_PAGE_BYTES
    is_long = bit // 8 % SEGMENT_BYTES < WAL_PAGE_BYTES
    if byte in (2, 3, 4, 5, 6, 7, 20, 21, 22, 23) or (is_long and byte < 40):
        return True
    return whole[bit // 8] == 0 and is_padding(segments, bit // 8)


def is_padding(segments: list[bytes], position: int) -> bool:
    """Whether the byte belongs to no record: then another value there leaves every record as it is."""
    changed = bytearray(b"".join(segments))
    changed[position] = 0xFF
    return not problems([bytes(changed[i : i + SEGMENT_BYTES]) for i in range(0, len(changed), SEGMENT_BYTES)])


@pytest.mark.parametrize("rest", ["zeros", "an older use of the file"])
def test_wal_that_ends_in_a_segment_is_no_damage_but_is_told(rest: str) -> None:
    content = bytearray(written([500]).segments()[0])
    end = 40 * WAL_PAGE_BYTES
    older = WalWriter(9 * SEGMENT_BYTES)
    older.filler(2 * SEGMENT_BYTES)
    content[end:] = bytes(len(content) - end) if rest == "zeros" else older.segments()[0][end:]
    segment = check(bytes(content))
    assert segment.ended_at is not None
    assert SEGMENT_BYTES + end - WAL_PAGE_BYTES < segment.ended_at <= SEGMENT_BYTES + end
    assert wal_ends_in(None, segment)


def test_zeros_in_the_middle_of_a_segment_are_damage() -> None:
    content = bytearray(written([500]).segments()[0])
    content[40 * WAL_PAGE_BYTES : 41 * WAL_PAGE_BYTES] = bytes(WAL_PAGE_BYTES)
    with pytest.raises(ValueError, match="damaged at 0/150000: it goes on at 0/152000"):
        check(bytes(content))


@settings(max_examples=13, deadline=None)
@given(integers(0, 12))
def test_a_switch_ends_a_segment_wherever_it_is_written(eights: int) -> None:
    writer = WalWriter()
    writer.filler(SEGMENT_BYTES - 128 * 24 - 2000)
    while writer.lsn < 2 * SEGMENT_BYTES - 150 + 8 * eights:
        writer.filler(0)
    writer.switch()
    writer.filler(100)
    assert problems(writer.segments()) == []


def test_a_record_that_a_crash_cut_short_and_that_was_given_up_is_good_wal() -> None:
    writer = WalWriter()
    writer.filler(100)
    writer.give_up_record(20_000)
    writer.filler(100)
    writer.filler(SEGMENT_BYTES - 5 * WAL_PAGE_BYTES)
    while writer.lsn < 2 * SEGMENT_BYTES - 1000:
        writer.filler(100)
    writer.give_up_record(30_000)
    writer.filler(SEGMENT_BYTES // 2)
    assert problems(writer.segments()) == []


def test_a_record_longer_than_two_segments_is_good_wal() -> None:
    writer = WalWriter()
    writer.filler(100)
    writer.filler(3 * SEGMENT_BYTES)
    writer.filler(100)
    assert problems(writer.segments()) == []


def test_the_next_segment_of_another_history_is_refused() -> None:
    one, other = written([700]), written([701])
    assert problems([one.segments()[0], other.segments()[1]])
