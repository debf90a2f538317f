"""Base backups taken of a standby: they restore, a promotion ends them, and one server of a cluster takes them."""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.domain.backup_schedule import PRIMARY_PATIENCE, BackupFrom, Why
from agent.domain.catalog import Backup
from agent.errors import BackupElsewhere, BackupFailed, RepositoryUnavailable
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.waiting import wait_until
from agent.repository.backup_mark import MARK_AGE, backup_mark, refuse_while_others
from agent.repository.backups import read_catalog
from agent.repository.keys import sentinel_key
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from tests.support.backup_agent import BackupAgent, MovedClock
from tests.support.base_backup import BackupLab, rows_changing, start_lab
from tests.support.postgres import MakeCluster
from tests.support.recovered import hydrated, pages_with_a_wrong_checksum, running

NOON = datetime(2031, 5, 6, 12, 0, tzinfo=UTC)
TOMORROW = NOON.replace(day=7, hour=2)


class Replicas:
    """A primary that archives, and a standby that streams from it; both with the same repository."""

    def __init__(self, primary: BackupLab, directory: Path) -> None:
        self.primary = primary
        cluster, source = PostgresCluster(directory, primary.cluster.binaries), primary.cluster
        source.stop()
        shutil.copytree(source.data_directory, directory, symlinks=True)
        (directory / "standby.signal").touch()
        hand_over(directory)
        source.start()
        where = f"host={source.socket_directory} port={source.port} user=postgres"
        cluster.configure(primary_conninfo=where, hot_standby="on")
        cluster.start()
        self.standby = BackupLab(cluster, primary.store)

    def follow(self) -> None:
        """Return when the standby has replayed a new checkpoint of the primary."""
        self.primary.cluster.execute("CHECKPOINT")
        position = self.primary.cluster.value("SELECT pg_current_wal_flush_lsn()")
        has_come = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        wait_until(lambda: self.standby.cluster.value(has_come, [position]), seconds=60, what="the standby to follow")

    def archive(self) -> None:
        """Have all WAL archived that there is."""
        self.primary.cluster.wait_until_archived(self.primary.cluster.switch_wal())


@pytest.fixture
def make_replicas(make_cluster: MakeCluster, lab_directory: Path) -> Iterator[Callable[[int], Replicas]]:
    """Makes running replicas of a major version."""
    made: list[Replicas] = []

    def make(major: int) -> Replicas:
        made.append(Replicas(start_lab(make_cluster(major), lab_directory), lab_directory / "standby"))
        return made[-1]

    yield make
    for replicas in made:
        replicas.standby.cluster.kill()


def nothing(_: object) -> None:
    """Report to nobody."""


async def take(lab: BackupLab) -> Backup:
    async with asyncio.timeout(120):
        return await lab.taker(take_from=BackupFrom.STANDBY).take(nothing)


def rows(cluster: PostgresCluster) -> Any:
    return cluster.query("SELECT count(*), md5(string_agg(b::text, ',' ORDER BY id)) FROM busy b")


def backup_keys(lab: BackupLab) -> set[str]:
    return {key for key in lab.store.keys() if key.startswith("basebackups_005/")}  # noqa: SIM118 - a method


@pytest.mark.parametrize("major", [13, 15, 18])
async def test_a_busy_standbys_backup_restores_every_row(
    make_replicas: Callable[[int], Replicas], lab_directory: Path, major: int
) -> None:
    replicas = await asyncio.to_thread(make_replicas, major)
    primary = replicas.primary.cluster
    with rows_changing(primary):
        await asyncio.to_thread(replicas.follow)
        backup = await take(replicas.standby)
    await asyncio.to_thread(replicas.archive)
    assert not [key for key in backup_keys(replicas.primary) if "in_progress" in key]
    restored = lab_directory / "restored"
    await hydrated(replicas.primary, backup.name, restored)
    with running(replicas.primary, restored) as cluster:
        assert rows(cluster) == rows(primary)
        await asyncio.to_thread(cluster.stop)
        assert pages_with_a_wrong_checksum(restored) == []


async def test_a_standby_promoted_in_the_middle_gives_the_backup_up_and_the_next_is_whole(
    make_replicas: Callable[[int], Replicas],
) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    await asyncio.to_thread(replicas.follow)
    standby = replicas.standby

    async def promote(key: str) -> None:
        if "/tar_partitions/" in key and standby.cluster.value("SELECT pg_is_in_recovery()"):
            assert standby.cluster.value("SELECT pg_promote()")

    standby.store.before_put = promote
    with pytest.raises(BackupFailed, match="promoted"):
        await take(standby)
    standby.store.before_put = None
    assert backup_keys(standby) == set()
    assert (await take(standby)).timeline == 2


async def test_two_backups_from_one_restartpoint_are_not_mixed(make_replicas: Callable[[int], Replicas]) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    await asyncio.to_thread(replicas.follow)
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(take(replicas.standby))
        await asyncio.to_thread(replicas.archive)
    first, held = taking.result(), backup_keys(replicas.standby)
    with pytest.raises(BackupFailed, match=f"already holds .*{first.name}") as caught:
        await take(replicas.standby)
    assert "The primary has made no checkpoint" in caught.value.hint
    assert backup_keys(replicas.standby) == held


async def test_the_primarys_data_directory_is_not_the_standbys(make_replicas: Callable[[int], Replicas]) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    await asyncio.to_thread(replicas.follow)
    primary = replicas.primary.cluster
    primary.execute("CREATE TABLE ahead AS SELECT 1", "CHECKPOINT")
    await asyncio.to_thread(primary.wait_until_archived, primary.switch_wal())
    taker = replicas.standby.taker(data_directory=primary.data_directory, take_from=BackupFrom.STANDBY)
    with pytest.raises(BackupFailed, match="it is a copy of the server's data directory"):
        async with asyncio.timeout(120):
            await taker.take(nothing)


async def test_until_a_failed_backup_is_removed_no_other_server_uses_its_name(
    make_replicas: Callable[[int], Replicas],
) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    await asyncio.to_thread(replicas.follow)
    store, clock, others = replicas.standby.store, SystemClock(), set[str]()

    async def fail(key: str) -> None:
        if key.endswith("metadata.json"):
            raise RepositoryUnavailable("the store is away")

    async def begin_another(keys: Sequence[str]) -> None:
        """As another standby's agent does, that has seen nothing of this name before the other began."""
        for key in keys:
            if "/tar_partitions/" in key:
                with suppress(BackupElsewhere):
                    async with backup_mark(store, key.split("/")[1], clock):
                        others.add(key)

    store.before_put, store.before_delete = fail, begin_another
    with pytest.raises(BackupFailed, match="the store is away"):
        await take(replicas.standby)
    store.before_put, store.before_delete = None, None
    assert others == set()
    assert backup_keys(replicas.standby) == set()
    await refuse_while_others(store, clock.now())


async def test_the_standby_takes_what_is_due_and_the_primary_what_no_standby_took(
    make_replicas: Callable[[int], Replicas],
) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    clock = MovedClock()
    clock.move_to(NOON)
    primary = BackupAgent(replicas.primary, clock, take_from=BackupFrom.STANDBY)
    standby = BackupAgent(replicas.standby, clock, take_from=BackupFrom.STANDBY)
    async with primary.running():
        await primary.plans(TOMORROW + PRIMARY_PATIENCE, Why.SCHEDULE)
        assert len(await read_catalog(replicas.primary.store)) == 1, "the first one cannot wait for a standby"
        async with standby.running():
            await asyncio.to_thread(replicas.follow)
            with rows_changing(replicas.primary.cluster):
                clock.move_to(TOMORROW + timedelta(minutes=3))
                await standby.plans_after(TOMORROW + timedelta(minutes=3))
            assert len(await read_catalog(replicas.primary.store)) == 2
            assert standby.scheduler.status().newest[0].finish_time > TOMORROW
            clock.move_to(TOMORROW + PRIMARY_PATIENCE)
            await primary.plans_after(TOMORROW + PRIMARY_PATIENCE)
            assert len(await read_catalog(replicas.primary.store)) == 2
        clock.move_to(TOMORROW + timedelta(days=1) + PRIMARY_PATIENCE)
        await primary.plans_after(TOMORROW + timedelta(days=2))
    assert len(await read_catalog(replicas.primary.store)) == 3


async def test_a_standbys_scheduled_backup_begins_at_once_for_the_others_to_hear_of_it(
    make_replicas: Callable[[int], Replicas],
) -> None:
    replicas = await asyncio.to_thread(make_replicas, 15)
    await asyncio.to_thread(replicas.follow)
    async with asyncio.TaskGroup() as group:
        taker = replicas.standby.taker(take_from=BackupFrom.STANDBY)
        group.create_task(taker.take(nothing, fast=False))
        await asyncio.to_thread(replicas.archive)
    assert "restartpoint starting: immediate force wait" in replicas.standby.cluster.log_text()


async def test_of_several_servers_one_takes_a_backup_until_its_mark_is_old() -> None:
    store, clock = MemoryObjectStore(), SystemClock()
    await store.put(sentinel_key("base_000000010000000000000001"), b"{}")
    async with backup_mark(store, "base_000000010000000000000002", clock):
        for name in ("base_000000010000000000000002", "base_000000010000000000000003"):
            with pytest.raises(BackupElsewhere, match="base_000000010000000000000002"):
                async with backup_mark(store, name, clock):
                    pass
        with pytest.raises(BackupElsewhere):
            await refuse_while_others(store, clock.now())
        await refuse_while_others(store, clock.now() + MARK_AGE)
    await refuse_while_others(store, clock.now())
    assert [info.key async for info in store.list("")] == [sentinel_key("base_000000010000000000000001")]
