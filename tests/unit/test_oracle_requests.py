"""A large archive is answered for with a few requests."""

from datetime import timedelta

import pytest

from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.wal_around import Around
from agent.errors import NoRestorePath
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_around import read_around
from agent.repository.window import read_window
from agent.restore.planner import plan_from_repository
from tests.support.large_archive import FIRST, LargeArchive
from tests.support.object_formats import PLAIN
from tests.support.wal_writer import SEGMENT_BYTES

SEGMENTS = 100_000
PAGES = SEGMENTS // 1000 + 14  # of a listing, and the last one of each piece
BULK = range(60_000, 66_000)


@pytest.fixture
async def archive() -> LargeArchive:
    """100,000 segments, ten base backups, and a bulk load of 6,000 segments in which nothing commits."""
    archive = LargeArchive(SEGMENTS, backup_every=10_000, bulk=BULK)
    await archive.prepare()
    return archive


def at(archive: LargeArchive, number: int, **later: float) -> RestoreTarget:
    return RestoreTarget(TargetKind.TIME, time=archive.moment(number) + timedelta(**later))


async def test_the_window_of_100000_segments_costs_one_listing_and_a_few_heads(archive: LargeArchive) -> None:
    view = await read_window(archive, WalArchive(archive, PLAIN))
    (timeline,) = view.window.timelines
    (reach,) = timeline.ranges
    last = max(number for number in range(SEGMENTS, SEGMENTS + FIRST) if archive.has_commit(number))
    assert (reach.from_time, reach.to_time) == (archive.moment(FIRST), archive.moment(last))
    assert archive.requests["list"] <= PAGES + 2
    assert archive.requests["head"] <= 5
    assert archive.requests["open"] == 0


@pytest.mark.parametrize("number", [FIRST + 4, 1_234, 59_999, 65_000, 66_001, 99_990])
async def test_a_time_in_100000_segments_costs_a_few_heads_and_two_downloads(
    archive: LargeArchive, number: int
) -> None:
    plan = await plan_from_repository(archive, WalArchive(archive, PLAIN), at(archive, number, seconds=1))
    beyond = next(n for n in range(number + 1, number + 7000) if archive.has_commit(n))
    assert plan.last_segment == plan.segments[-1]
    assert plan.stop_lsn is not None
    assert plan.stop_lsn // SEGMENT_BYTES == beyond
    assert int(plan.backup.name[-8:], 16) <= beyond
    assert archive.requests["head"] <= (1000 if BULK.start - 2 < number < BULK.stop + 2 else 100)
    assert archive.requests["open"] <= 5


async def test_a_transaction_in_100000_segments_costs_a_few_downloads(archive: LargeArchive) -> None:
    number = 43_210
    plan = await plan_from_repository(
        archive, WalArchive(archive, PLAIN), RestoreTarget(TargetKind.XID, xid=1000 + number)
    )
    assert plan.stop_lsn is not None
    assert plan.stop_lsn // SEGMENT_BYTES == number
    assert archive.requests["open"] <= 40


async def test_a_transaction_that_never_ended_costs_no_more(archive: LargeArchive) -> None:
    with pytest.raises(NoRestorePath, match="does not show the target"):
        await plan_from_repository(
            archive, WalArchive(archive, PLAIN), RestoreTarget(TargetKind.XID, xid=1000 + 43_209)
        )
    assert archive.requests["open"] <= 60


async def test_a_position_in_100000_segments_costs_one_download(archive: LargeArchive) -> None:
    target = RestoreTarget(TargetKind.LSN, lsn=70_001 * SEGMENT_BYTES + 40)
    plan = await plan_from_repository(archive, WalArchive(archive, PLAIN), target)
    assert len(plan.segments) <= 10_000
    assert archive.requests["open"] == 1


async def test_segments_without_our_metadata_are_downloaded_only_where_the_search_looks() -> None:
    archive = LargeArchive(2_000, backup_every=500, with_times=False)
    await archive.prepare()
    plan = await plan_from_repository(archive, WalArchive(archive, PLAIN), at(archive, 1_601, seconds=1))
    assert plan.stop_lsn is not None
    assert plan.stop_lsn // SEGMENT_BYTES == 1_603
    assert archive.requests["open"] <= 25
    with pytest.raises(NoRestorePath, match="shows nothing after"):
        await plan_from_repository(archive, WalArchive(archive, PLAIN), at(archive, 9_000))


async def test_the_transactions_around_a_time_in_100000_segments_cost_a_few_downloads(archive: LargeArchive) -> None:
    number = 43_210
    moment = archive.moment(number)
    around = Around(moment, moment - timedelta(milliseconds=1), moment + timedelta(milliseconds=1))
    found = await read_around(
        archive, WalArchive(archive, PLAIN), PLAIN, around, "latest",
        limit=10, most_segments=64, report=lambda _done, _total: None,
    )  # fmt: skip
    assert [ended.time for ended in found.transactions] == [moment]
    assert archive.requests["head"] <= 200
    assert archive.requests["open"] <= 4
