"""Plans out of repositories with what no plan can use: damaged base backups, and a partial segment."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from agent.domain.lsn import format_lsn
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.timeline import history_name
from agent.domain.wal import segment_name
from agent.errors import NoRestorePath, RepositoryCorrupt
from agent.repository.keys import sentinel_key, wal_key
from agent.repository.wal_archive import WalArchive
from agent.restore.planner import NEWEST, plan_from_repository
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import PLAIN
from tests.support.wal_world import World
from tests.support.wal_writer import SEGMENT_BYTES

DAMAGED = "base_000000010000000000000FFF"


@pytest.fixture
def world() -> World:
    """A base backup and some WAL."""
    world = World()
    world.end_transaction(commits=True)
    world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    return world


async def plan(world: World, backup_name: str = NEWEST, *, parent: str | None = None) -> str:
    store = MemoryObjectStore()
    await store.put(sentinel_key(DAMAGED), b"{")
    for backup in world.backups:
        sentinel: dict[str, object] = {
            "LSN": backup.start_lsn,
            "FinishLSN": backup.finish_lsn,
            "PgVersion": backup.pg_version,
        }
        if parent is not None:
            sentinel |= {"DeltaFrom": parent, "DeltaFullName": parent, "DeltaCount": 1, "DeltaLSN": 1}
        await store.put(sentinel_key(backup.name), json.dumps(sentinel).encode())
    for name, content in world.archived.items():
        await store.put(wal_key(name, ""), content)
    archive = WalArchive(store, PLAIN)
    return (await plan_from_repository(store, archive, RestoreTarget(), backup_name)).backup.name


async def test_the_tail_in_a_partial_segment_is_reached_on_the_timeline_that_goes_on_from_it_alone() -> None:
    world, store = World(), MemoryObjectStore()
    world.back_up(1, late=timedelta(0), parent=None)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    tail, begin_lsn = RestoreTarget(TargetKind.TIME, world.now), world.writer.lsn // SEGMENT_BYTES * SEGMENT_BYTES
    world.now += timedelta(seconds=1)
    world.end_transaction(commits=True)
    partial = f"{segment_name(1, begin_lsn, SEGMENT_BYTES)}.partial"
    await store.put(wal_key(partial, ""), world.writer.segments()[-1])
    world.fork(0)
    world.switch()
    world.archive()
    (ancestor,), (backup,) = world.histories[2], world.backups
    await store.put(wal_key(history_name(2), ""), f"1\t{format_lsn(ancestor.switch_lsn)}\tpromoted\n".encode())
    times = {"StartTime": backup.start_time.isoformat(), "FinishTime": backup.finish_time.isoformat()}
    sentinel = {"LSN": backup.start_lsn, "FinishLSN": backup.finish_lsn, "PgVersion": backup.pg_version, **times}
    await store.put(sentinel_key(backup.name), json.dumps(sentinel).encode())
    for name, content in world.archived.items():
        await store.put(wal_key(name, ""), content)
    archive = WalArchive(store, PLAIN)
    found = await plan_from_repository(store, archive, tail, NEWEST)
    assert (found.timeline, found.last_segment) == (2, segment_name(2, begin_lsn, SEGMENT_BYTES))
    with pytest.raises(NoRestorePath, match=r"on timeline 1 .* shows nothing after"):
        await plan_from_repository(store, archive, replace(tail, timeline="1"), NEWEST)


async def test_the_others_serve(world: World) -> None:
    (backup,) = world.backups
    assert await plan(world) == backup.name
    assert await plan(world, backup.name) == backup.name


async def test_a_damaged_backup_that_is_named_is_the_error(world: World) -> None:
    with pytest.raises(RepositoryCorrupt, match=DAMAGED):
        await plan(world, DAMAGED)


async def test_a_damaged_backup_that_the_only_other_builds_on_is_the_error(world: World) -> None:
    with pytest.raises(RepositoryCorrupt, match=DAMAGED):
        await plan(world, parent=DAMAGED)


async def test_a_repository_with_nothing_but_damaged_backups_is_not_called_empty(world: World) -> None:
    world.backups.clear()
    with pytest.raises(RepositoryCorrupt, match=DAMAGED):
        await plan(world)


async def test_a_backup_that_is_not_there_is_not_called_damaged(world: World) -> None:
    with pytest.raises(NoRestorePath, match="there is no base backup base_X"):
        await plan(world, "base_X")
