"""The records of interest are found, whole and in order, in good WAL; bad WAL ends early and never breaks the walk."""

import struct
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import binary, datetimes, integers, just, lists, one_of, sampled_from, tuples

from agent.domain.wal import MAGIC_BY_MAJOR, WAL_PAGE_BYTES
from agent.domain.wal_records import RecordKind, WalRecord, from_wal_time
from agent.domain.wal_scan import RecordJoiner, scan_segment
from tests.support.wal_damage import Damage, cut_to_zeros, damaged, flip, overwrite
from tests.support.wal_sources import join_records
from tests.support.wal_writer import SEGMENT_BYTES, WalWriter, to_wal_time

MOMENT = datetime(2026, 11, 22, 19, 53, 41, 123456, tzinfo=UTC)
WAL_TIME = to_wal_time(MOMENT)
SIZES = one_of(integers(0, 300), integers(7_900, 8_400), integers(0, 60_000))
MAJORS = sampled_from(sorted(MAGIC_BY_MAJOR))


def records_of(writer: WalWriter) -> list[WalRecord]:
    return list(join_records(map(scan_segment, writer.segments())))


@given(datetimes(min_value=datetime(1, 1, 1), timezones=just(UTC)))  # noqa: DTZ001 - hypothesis adds the zone
def test_a_time_survives_the_way_into_wal_and_back(moment: datetime) -> None:
    assert from_wal_time(to_wal_time(moment)) == moment


@given(MAJORS, lists(tuples(SIZES, sampled_from(["commit", "abort", "restore point", "backup end", "filler"]))))
def test_every_record_of_interest_is_found_where_it_was_written(major: int, plan: list[tuple[int, str]]) -> None:
    writer = WalWriter(major=major)
    expected: list[tuple[RecordKind, int, int]] = []
    for size, kind in plan:
        writer.filler(size)
        match kind:
            case "commit":
                expected.append((RecordKind.COMMIT, *writer.transaction(0x00, 700, WAL_TIME)))
            case "abort":
                expected.append((RecordKind.ABORT, *writer.transaction(0x20, 700, WAL_TIME)))
            case "restore point":
                expected.append((RecordKind.RESTORE_POINT, *writer.restore_point("before the drop", WAL_TIME)))
            case "backup end":
                expected.append((RecordKind.BACKUP_END, *writer.backup_end(SEGMENT_BYTES)))
    assert [(record.kind, record.lsn, record.end_lsn) for record in records_of(writer)] == expected


@settings(max_examples=25)
@given(integers(SEGMENT_BYTES - 3000, SEGMENT_BYTES - 2_500), integers(0, 3))
def test_a_record_is_found_across_any_boundary_between_segments(size: int, more: int) -> None:
    writer = WalWriter()
    writer.filler(size - 2048)  # ends near the end of the segment, page headers included
    written = []
    while writer.lsn < 2 * SEGMENT_BYTES + WAL_PAGE_BYTES * more:
        written.append(writer.transaction(0x00, 700, WAL_TIME))
    assert [(record.lsn, record.end_lsn) for record in records_of(writer)] == written
    assert any(lsn < 2 * SEGMENT_BYTES < end for lsn, end in written) or any(
        end in (2 * SEGMENT_BYTES, 2 * SEGMENT_BYTES + 40) for _, end in written
    )


def test_a_record_longer_than_a_segment_is_crossed() -> None:
    writer = WalWriter()
    first = writer.transaction(0x00, 700, WAL_TIME)
    writer.filler(3 * SEGMENT_BYTES)
    second = writer.transaction(0x00, 701, WAL_TIME)
    joiner = RecordJoiner()
    records = [record for segment in writer.segments() for record in joiner.take(scan_segment(segment))]
    assert [(record.lsn, record.end_lsn) for record in records] == [first, second]
    assert joiner.last_lsn == second[0]
    assert joiner.ended, "the last segment ends with zeros"


def test_a_commit_longer_than_a_segment_keeps_its_time() -> None:
    writer = WalWriter()
    subtransactions = struct.pack("<II", 1 << 1, 600_000) + bytes(4 * 600_000)
    writer.transaction(0x00, 700, WAL_TIME, rest=subtransactions)
    (record,) = records_of(writer)
    assert (record.xid, record.time) == (700, MOMENT)


def test_times_names_and_positions_are_read() -> None:
    writer = WalWriter()
    writer.transaction(0x00, 700, WAL_TIME)
    writer.restore_point("before the drop", WAL_TIME)
    writer.checkpoint(int(MOMENT.timestamp()))
    writer.backup_end(0x100028)
    commit, point, checkpoint, end = records_of(writer)
    assert (commit.xid, commit.time, commit.ends_transaction) == (700, MOMENT, True)
    assert (point.name, point.time, point.ends_transaction) == ("before the drop", MOMENT, False)
    assert checkpoint.time == MOMENT.replace(microsecond=0)
    assert (end.start_lsn, end.time) == (0x100028, None)


@pytest.mark.parametrize("opcode", [0x30, 0x40])
@pytest.mark.parametrize(("major", "item_bytes"), [(13, 0), (15, 12), (17, 12), (18, 16)])
def test_the_end_of_a_prepared_transaction_has_its_own_xid(opcode: int, major: int, item_bytes: int) -> None:
    flags = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 8 if item_bytes else 0)
    stats = struct.pack("<I", 3) + bytes(3 * item_bytes) if item_bytes else b""
    rest = (
        struct.pack("<III", flags, 5, 1663)
        + (struct.pack("<I", 2) + bytes(2 * 4))
        + (struct.pack("<I", 1) + bytes(12))
        + stats
        + (struct.pack("<I", 4) + bytes(4 * 16))
        + struct.pack("<I", 4711)
    )
    writer = WalWriter(major=major)
    writer.transaction(opcode, 0, WAL_TIME, rest=rest)
    (record,) = records_of(writer)
    assert (record.xid, record.time) == (4711, MOMENT)


def test_an_origin_and_a_top_level_xid_before_the_data_are_skipped() -> None:
    writer = WalWriter()
    before = b"\xfd" + struct.pack("<H", 1) + b"\xfc" + struct.pack("<I", 699)
    writer.record(1, 0x00, struct.pack("<q", WAL_TIME), xid=700, before_main=before)
    (record,) = records_of(writer)
    assert (record.xid, record.time) == (700, MOMENT)


def test_a_switch_ends_its_segment_and_the_next_one_goes_on() -> None:
    writer = WalWriter()
    before = writer.transaction(0x00, 700, WAL_TIME)
    switch = writer.switch()
    after = writer.transaction(0x00, 701, WAL_TIME)
    assert [(r.lsn, r.end_lsn) for r in records_of(writer)] == [before, switch, after]
    assert switch[1] == 2 * SEGMENT_BYTES


def test_a_switch_across_a_boundary_skips_the_rest_of_the_next_segment() -> None:
    writer = WalWriter()
    while SEGMENT_BYTES - writer.lsn % SEGMENT_BYTES != 16:
        left = SEGMENT_BYTES - writer.lsn % SEGMENT_BYTES - 16
        writer.filler(min(left - 26, 200) if left > 60 else left - 26)
    switch = writer.switch()
    after = writer.transaction(0x00, 701, WAL_TIME)
    assert [(r.lsn, r.end_lsn) for r in records_of(writer)] == [switch, after]
    assert switch[1] == 3 * SEGMENT_BYTES


def test_a_record_that_a_crash_cut_short_is_passed_over() -> None:
    writer = WalWriter()
    before = writer.transaction(0x00, 700, WAL_TIME)
    writer.give_up_record(20_000)
    after = writer.transaction(0x00, 701, WAL_TIME)
    assert [(r.lsn, r.end_lsn) for r in records_of(writer)] == [before, after]


def test_a_missing_segment_ends_the_wal() -> None:
    writer = WalWriter()
    writer.transaction(0x00, 700, WAL_TIME)
    writer.filler(2 * SEGMENT_BYTES)
    writer.transaction(0x00, 701, WAL_TIME)
    first, _, last = map(scan_segment, writer.segments())
    assert [record.xid for record in join_records([first, last])] == [700]


def test_a_segment_that_continues_another_record_ends_the_wal() -> None:
    first, second = WalWriter(), WalWriter()
    first.filler(SEGMENT_BYTES)
    second.filler(SEGMENT_BYTES + 8)
    second.transaction(0x00, 701, WAL_TIME)
    joiner = RecordJoiner()
    joiner.take(scan_segment(first.segments()[0]))
    assert joiner.take(scan_segment(second.segments()[1])) == []
    assert joiner.ended


def test_a_record_with_a_wrong_crc_ends_the_wal() -> None:
    writer = WalWriter()
    first, _ = writer.transaction(0x00, 700, WAL_TIME)
    second, _ = writer.transaction(0x00, 701, WAL_TIME)
    writer.transaction(0x00, 702, WAL_TIME)
    content = bytearray(writer.segments()[0])
    content[second - SEGMENT_BYTES + 27] ^= 1
    scan = scan_segment(bytes(content))
    assert [record.xid for record in scan.records] == [700]
    assert (scan.is_whole, scan.last_lsn) == (False, first)


def busy_segment() -> bytes:
    writer = WalWriter()
    while writer.lsn < 2 * SEGMENT_BYTES:
        writer.filler(150)
        writer.transaction(0x00, 700, WAL_TIME)
        writer.checkpoint(1)
    return writer.segments()[0]


BUSY = busy_segment()


@example([(flip, 16, 0xFF)])
@example([(flip, 2, 0x01)])
@given(
    lists(
        tuples(
            sampled_from([flip, overwrite, cut_to_zeros]),
            one_of(integers(0, 100), integers(8_180, 8_240), integers(0, SEGMENT_BYTES - 1)),
            integers(1, 255),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_wal_is_refused_or_ends_early(damage: list[Damage]) -> None:
    try:
        scan = scan_segment(damaged(BUSY, damage))
    except ValueError:
        return
    good = {record.lsn: record for record in scan_segment(BUSY).records}
    assert all(good.get(record.lsn) == record for record in scan.records)
    list(join_records([scan, scan_segment(BUSY)]))


@given(binary(max_size=200))
def test_what_is_no_segment_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"bytes|header|magic"):
        scan_segment(content)
