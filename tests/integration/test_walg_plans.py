"""Every target of the repositories written by WAL-G is answered as PostgreSQL answered it."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import RestoreTarget, TargetKind, parse_restore_target, parse_time
from agent.domain.wal_records import RecordKind, WalRecord
from agent.domain.wal_scan import SegmentScan, scan_segment
from agent.errors import NoRestorePath
from agent.ports import ObjectStore
from agent.repository.keys import WAL_FOLDER
from agent.repository.wal_archive import WalArchive
from agent.repository.window import read_window
from agent.restore.planner import NEWEST, plan_from_repository
from agent.storage.directory import DirectoryObjectStore
from agent.storage.memory import MemoryObjectStore
from tests.support.wal_sources import join_records
from tests.support.walg_buckets import BUCKETS, RecoveryPoint, WalgBucket, needs_walg_buckets, recovery_points

pytestmark = needs_walg_buckets

REPOSITORIES = [
    "pg13-lz4-16mb", "pg15-libsodium-hex", "pg15-lz4-full", "pg15-lzma", "pg15-timelines", "pg16-tablespaces",
    "pg17-zstd-delta",
]  # fmt: skip
REACHABLE = [point for name in REPOSITORIES for point in recovery_points(name, reachable=True)]
UNREACHABLE = [point for name in REPOSITORIES for point in recovery_points(name, reachable=False)]

StoreOf = Callable[[WalgBucket], Awaitable[MemoryObjectStore]]


@pytest.fixture(scope="module")
def store_of() -> StoreOf:
    """Loads a repository into memory, once."""
    loaded: dict[str, MemoryObjectStore] = {}

    async def load(bucket: WalgBucket) -> MemoryObjectStore:
        if bucket.name not in loaded:
            store = MemoryObjectStore()
            for item in sorted(bucket.expected["objects"], key=lambda item: int(item["modified_ns"])):
                await store.put(item["key"], (BUCKETS / bucket.name / "bucket" / item["key"]).read_bytes())
            loaded[bucket.name] = store
        return loaded[bucket.name]

    return load


async def plan(store: ObjectStore, bucket: WalgBucket, target: RestoreTarget, backup: str | None = None) -> RestorePlan:
    return await plan_from_repository(store, WalArchive(store, bucket.objects), target, backup or NEWEST)


@pytest.mark.parametrize("point", REACHABLE, ids=str)
async def test_a_target_that_can_be_reached_is_planned_from_the_newest_backup_that_serves_it(
    point: RecoveryPoint, store_of: StoreOf
) -> None:
    found = await plan(await store_of(point.bucket), point.bucket, parse_restore_target(point.settings), point.backup)
    assert found.backup.name == (point.backup or point.expected["nearest_backup"])
    assert str(found.timeline) == found.effective_target.timeline == str(point.expected["timeline"])
    assert [backup.name for backup in found.chain][-1] == found.backup.name
    stored = {item["key"]: item["bytes"] for item in point.bucket.expected["objects"]}
    wal = [size for key, size in stored.items() if key.removeprefix(WAL_FOLDER)[:24] in found.segments]
    assert found.download_bytes >= sum(wal) + sum(backup.stored_bytes for backup in found.chain) - max(wal) > 0
    assert found.note == ""


@pytest.mark.parametrize("point", UNREACHABLE, ids=str)
async def test_a_target_that_cannot_be_reached_is_refused(point: RecoveryPoint, store_of: StoreOf) -> None:
    target = parse_restore_target(point.settings)
    with pytest.raises(NoRestorePath) as refused:
        await plan(await store_of(point.bucket), point.bucket, target)
    assert str(target) in refused.value.message
    if target.kind is TargetKind.TIME:
        nearest = refused.value.nearest_before or refused.value.nearest_after
        assert nearest is not None
        reached = await plan(
            await store_of(point.bucket),
            point.bucket,
            RestoreTarget(TargetKind.TIME, time=nearest, timeline=target.timeline),
        )
        assert reached.segments


@pytest.mark.parametrize("point", [point for point in REACHABLE if point.backup is None], ids=str)
async def test_a_backup_that_served_no_such_restore_is_refused(point: RecoveryPoint, store_of: StoreOf) -> None:
    store = await store_of(point.bucket)
    for backup in point.bucket.expected["backups"]:
        if backup["name"] not in point.expected["restorable_from"]:
            with pytest.raises(NoRestorePath, match=backup["name"]):
                await plan(store, point.bucket, parse_restore_target(point.settings), backup["name"])


@pytest.mark.parametrize("point", [point for point in REACHABLE if point.backup is None], ids=str)
async def test_with_a_segment_lost_the_plan_names_the_gap_and_the_nearest_moment_that_is_left(
    point: RecoveryPoint, store_of: StoreOf
) -> None:
    whole = await store_of(point.bucket)
    target = parse_restore_target(point.settings)
    needed = await plan(whole, point.bucket, target)
    lost = needed.segments[len(needed.segments) // 2]
    store = MemoryObjectStore()
    async for info in whole.list(""):
        if not info.key.startswith(f"{WAL_FOLDER}{lost}"):
            stored = await whole.get(info.key)
            assert stored is not None
            await store.put(info.key, stored.body)
    if lost == needed.last_segment or await reaches(store, point):
        return  # an older base backup, or less WAL, leads there too; or nothing tells that there was more WAL
    with pytest.raises(NoRestorePath) as refused:
        await plan(store, point.bucket, target)
    assert lost in refused.value.message
    for moment in (refused.value.nearest_before, refused.value.nearest_after):
        if moment is not None:
            near = RestoreTarget(TargetKind.TIME, time=moment, timeline=target.timeline)
            assert lost not in (await plan(store, point.bucket, near)).segments
    assert refused.value.nearest_before is not None or lost in (needed.segments[0], needed.segments[1])


async def reaches(store: ObjectStore, point: RecoveryPoint) -> bool:
    try:
        await plan(store, point.bucket, parse_restore_target(point.settings))
    except NoRestorePath:
        return False
    return True


@pytest.mark.parametrize("name", REPOSITORIES)
async def test_the_window_holds_every_moment_that_was_reached(name: str, store_of: StoreOf) -> None:
    bucket = WalgBucket(name)
    window = (await read_window(await store_of(bucket), WalArchive(await store_of(bucket), bucket.objects))).window
    assert window.system_identifier == bucket.expected["system_identifier"]
    assert window.gaps == ()
    ranges = {each.timeline: each.ranges for each in window.timelines}
    assert [(each.timeline, each.parent) for each in window.timelines] == [
        (timeline["id"], timeline["parent"]) for timeline in bucket.expected["timelines"]
    ]
    for point in (point for point in bucket.expected["checkpoints"] if "target_time" in point):
        moment = parse_time("target_time", point["target_time"])
        held = [reach for reach in ranges[point["timeline"]] if reach.from_time <= moment <= reach.to_time]
        assert bool(held) is point["reachable"], point["id"]


@pytest.mark.parametrize("name", REPOSITORIES)
async def test_a_directory_is_planned_from_like_any_store(name: str, tmp_path: Path) -> None:
    bucket = WalgBucket(name)
    store = DirectoryObjectStore(bucket.copy_to(tmp_path / "bucket"))
    end = [point for point in recovery_points(name, reachable=True) if point.expected.get("end_of_wal")][-1]
    found = await plan(store, bucket, parse_restore_target({}))
    assert found.backup.name == end.expected["nearest_backup"]
    assert found.last_segment == bucket.expected["timelines"][-1]["last_segment"]


@pytest.mark.parametrize("name", REPOSITORIES)
async def test_the_wal_shows_the_transactions_and_restore_points_that_were_recorded(
    name: str, store_of: StoreOf
) -> None:
    bucket = WalgBucket(name)
    archive = WalArchive(await store_of(bucket), bucket.objects)
    for timeline in bucket.expected["timelines"]:
        records = await records_of(archive, timeline["id"])
        points = [p for p in bucket.expected["checkpoints"] if p["timeline"] == timeline["id"]]
        named = {record.name for record in records if record.kind is RecordKind.RESTORE_POINT}
        ended = {record.xid: record.time for record in records if record.ends_transaction}
        for point in (point for point in points if point["reachable"]):
            assert point.get("target_name") in {None, *named}
            assert point.get("target_xid") in {None, *ended}
        after = [parse_time("target_time", p["target_time"]) for p in points if p["id"] == "after-the-end"]
        last = max(time for time in ended.values() if time is not None)
        # "One hour after the last archived commit" was noted a moment after it.
        assert all(timedelta(0) <= moment - timedelta(hours=1) - last < timedelta(seconds=1) for moment in after)


async def records_of(archive: WalArchive, timeline: int) -> list[WalRecord]:
    scans: list[SegmentScan] = []
    for item in await archive.list_files():
        if item.kind == "segment" and item.name.startswith(f"{timeline:08X}"):
            content = await archive.fetch(item.name)
            assert content is not None
            scans.append(scan_segment(content))
    return list(join_records(scans))
