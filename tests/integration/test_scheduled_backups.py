"""Base backups that nobody asks for: when they are taken, by whom, and what becomes of those that fail."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.backup.order import BackupOrder
from agent.domain.backup_schedule import Why
from agent.errors import BackupFailed, RepositoryUnavailable
from agent.repository.backups import read_catalog
from tests.support.backup_agent import BackupAgent, MovedClock
from tests.support.base_backup import BackupLab, start_lab
from tests.support.postgres import MakeCluster
from tests.support.until import until


@pytest.fixture
def lab(make_cluster: MakeCluster, lab_directory: Path) -> BackupLab:
    """A running PostgreSQL 15 that archives into a directory."""
    return start_lab(make_cluster(15), lab_directory)


@pytest.fixture
def clock() -> MovedClock:
    """A clock that shows noon of some day."""
    clock = MovedClock()
    clock.move_to(NOON)
    return clock


NOON = datetime(2031, 5, 6, 12, 0, tzinfo=UTC)
TODAY, TOMORROW = NOON.replace(hour=2), NOON.replace(day=7, hour=2)


async def backups(lab: BackupLab) -> int:
    return len(await read_catalog(lab.store))


def before_put(action: Callable[[], Awaitable[None]]) -> Callable[[str], Awaitable[None]]:
    """Do `action` before an object of a base backup is stored."""

    async def act(key: str) -> None:
        if key.startswith("basebackups_005/"):
            await action()

    return act


async def refuse() -> None:
    raise RepositoryUnavailable("the store is away")


async def test_an_idle_server_without_a_backup_gets_one_at_once_and_then_by_the_schedule(
    lab: BackupLab, clock: MovedClock
) -> None:
    async with BackupAgent(lab, clock).running() as agent:
        await agent.plans(TOMORROW, Why.SCHEDULE)
        assert await backups(lab) == 1
        clock.move_to(TOMORROW)
        await agent.plans(TOMORROW + timedelta(days=1), Why.SCHEDULE)
        assert await backups(lab) == 2
        status = agent.scheduler.status()
        assert (status.complete, status.running, status.last_failure, status.waiting_for) == (2, None, None, None)
        assert [newest.kind for newest in status.newest] == ["full"]
        # The agent was away for a week.
    clock.move_to(TOMORROW + timedelta(days=7, hours=3))
    async with BackupAgent(lab, clock).running() as agent:
        await agent.plans(TOMORROW + timedelta(days=8), Why.SCHEDULE)
        assert await backups(lab) == 3
    async with BackupAgent(lab, clock).running() as agent:
        await agent.plans(TOMORROW + timedelta(days=8), Why.SCHEDULE)
    assert await backups(lab) == 3


async def test_the_first_backup_waits_until_wal_is_archived(lab: BackupLab, clock: MovedClock) -> None:
    lab.cluster.execute("ALTER SYSTEM SET archive_command = 'false'", "SELECT pg_reload_conf()")
    async with BackupAgent(lab, clock).running() as agent:
        await until(lambda: "first WAL" in (agent.scheduler.status().waiting_for or ""), what="the wait for WAL")
        assert await backups(lab) == 0
        lab.cluster.execute("ALTER SYSTEM RESET archive_command", "SELECT pg_reload_conf()")
        await agent.plans(TOMORROW, Why.SCHEDULE)
    assert await backups(lab) == 1


async def test_a_failed_backup_is_told_and_tried_again_later(lab: BackupLab, clock: MovedClock) -> None:
    lab.store.before_put = before_put(refuse)
    async with BackupAgent(lab, clock).running() as agent:
        await until(lambda: agent.scheduler.status().last_failure is not None, what="a failure")
        failure = agent.scheduler.status().last_failure
        assert failure is not None
        assert (failure.in_a_row, "the store is away" in failure.reason) == (1, True)
        await agent.plans(failure.at + timedelta(minutes=1), Why.FIRST)
        lab.store.before_put = None
        assert await backups(lab) == 0
        clock.move_to(failure.at + timedelta(minutes=1))
        await agent.plans(TOMORROW, Why.SCHEDULE)
        assert await backups(lab) == 1
        assert agent.runner.failures == 0


async def test_a_server_that_lets_nobody_in_is_told_and_ends_no_service(lab: BackupLab, clock: MovedClock) -> None:
    async with BackupAgent(lab, clock).running() as agent:
        await agent.plans(TOMORROW, Why.SCHEDULE)
        lab.cluster.execute("ALTER ROLE postgres NOLOGIN")
        clock.move_to(TOMORROW)
        await until(lambda: agent.scheduler.status().last_failure is not None, what="a failure")
        failure = agent.scheduler.status().last_failure
        assert failure is not None
        await agent.plans(failure.at + timedelta(minutes=1), Why.RETRY)
    assert await backups(lab) == 1


async def test_a_server_stopped_in_the_middle_is_told_and_made_up_for(lab: BackupLab, clock: MovedClock) -> None:
    async def crash() -> None:
        lab.store.before_put = None
        await asyncio.to_thread(lab.cluster.restart, "immediate")

    lab.store.before_put = before_put(crash)
    async with BackupAgent(lab, clock).running() as agent:
        await until(lambda: agent.scheduler.status().last_failure is not None, what="a failure")
        failure = agent.scheduler.status().last_failure
        assert failure is not None
        assert "base backup" in failure.reason
        await agent.plans(failure.at + timedelta(minutes=1), Why.FIRST)
        clock.move_to(failure.at + timedelta(minutes=1))
        await agent.plans(TOMORROW, Why.SCHEDULE)
    assert await backups(lab) == 1


async def test_two_agents_of_one_server_take_one_backup(lab: BackupLab, clock: MovedClock) -> None:
    async with BackupAgent(lab, clock).running() as one, BackupAgent(lab, clock).running() as two:
        for agent in (one, two):
            await agent.plans(TOMORROW, Why.SCHEDULE)
        assert await backups(lab) == 1
        clock.move_to(TOMORROW)
        for agent in (one, two):
            await agent.plans(TOMORROW + timedelta(days=1), Why.SCHEDULE)
        assert await backups(lab) == 2
        assert one.scheduler.status().last_failure is two.scheduler.status().last_failure is None


async def test_who_asks_while_another_agent_is_at_it_is_told(lab: BackupLab, clock: MovedClock) -> None:
    async with BackupAgent(lab, clock, schedule=None).running() as agent:
        await until(lambda: agent.scheduler.status().complete == 0, what="the first look")
        async with lab.server().only_backup():
            run = agent.runner.start(BackupOrder())
            assert await run.ended(60)
            with pytest.raises(BackupFailed, match="another agent is taking a base backup"):
                run.result()
        assert agent.scheduler.status().last_failure is None
        assert await agent.runner.start(BackupOrder(permanent=True)).ended(60)
    assert [backup.permanent for backup in await read_catalog(lab.store)] == [True]


async def test_a_cancelled_backup_leaves_nothing_and_is_not_made_up_for(lab: BackupLab, clock: MovedClock) -> None:
    hanging = asyncio.Event()

    async def hang() -> None:
        hanging.set()
        await asyncio.Event().wait()

    lab.store.before_put = before_put(hang)
    async with BackupAgent(lab, clock).running() as agent:
        await until(hanging.is_set, what="the first object to be stored")
        running = agent.scheduler.status().running
        assert running is not None
        assert running.why is Why.FIRST
        second = agent.runner.start(BackupOrder())
        assert second is agent.runner.running, "whoever asks for one meanwhile joins it"
        assert await agent.runner.cancel()
        with pytest.raises(BackupFailed, match="cancelled"):
            second.result()
        assert not [key for key in lab.store.keys() if key.startswith("basebackups_005/")]  # noqa: SIM118 - a method
        await agent.plans(TOMORROW, Why.SCHEDULE)
        assert not await agent.runner.cancel()
        lab.store.before_put = None
        clock.move_to(TOMORROW)
        await agent.plans(TOMORROW + timedelta(days=1), Why.SCHEDULE)
    assert await backups(lab) == 1


async def test_a_gap_asks_for_a_backup_until_there_is_one(lab: BackupLab, clock: MovedClock) -> None:
    async with BackupAgent(lab, clock, schedule=None).running() as agent:
        await until(lambda: agent.scheduler.status().complete == 0, what="the first look")
        assert await agent.runner.start(BackupOrder()).ended(60)
        lab.store.before_put = before_put(refuse)
        async with asyncio.TaskGroup() as group, asyncio.timeout(60):
            asking = group.create_task(agent.scheduler.reach_over_gap())
            await until(lambda: agent.scheduler.status().last_failure is not None, what="a failure")
            assert not asking.done()
            lab.store.before_put = None
            clock.moved += timedelta(minutes=2)
    assert await backups(lab) == 2


async def test_a_standby_plans_nothing(lab: BackupLab, clock: MovedClock) -> None:
    lab.cluster.stop()
    (lab.cluster.data_directory / "standby.signal").touch()
    lab.cluster.start()
    async with BackupAgent(lab, clock).running() as agent:
        await until(lambda: "standby" in (agent.scheduler.status().waiting_for or ""), what="the standby to be seen")
        assert agent.planned() is None
        lab.cluster.execute("SELECT pg_promote()")
        await agent.plans(TOMORROW, Why.SCHEDULE)
    assert await backups(lab) == 1


async def test_a_scheduled_backup_lets_the_checkpoint_take_its_time_and_one_asked_for_does_not(
    make_cluster: MakeCluster, lab_directory: Path, clock: MovedClock
) -> None:
    cluster = make_cluster(15, checkpoint_timeout="1h", checkpoint_completion_target="0.9", log_checkpoints=True)
    lab = start_lab(cluster, lab_directory)
    cluster.execute("CHECKPOINT", "CREATE TABLE dirty AS SELECT repeat('x', 1000) FROM generate_series(1, 8000)")
    async with BackupAgent(lab, clock, schedule=None).running() as agent:
        await until(lambda: agent.scheduler.status().complete == 0, what="an empty catalog")
        spread = agent.runner.start(BackupOrder(Why.SCHEDULE))
        await until(lambda: "checkpoint starting: force wait" in cluster.log_text(), what="a checkpoint")
        assert not await spread.ended(1)
        assert (spread.status().stage, spread.status().idle_seconds) == ("waiting for a checkpoint", 0)
        assert await agent.runner.cancel()
        asked_for = agent.runner.start(BackupOrder())
        assert await asked_for.ended(60)
        assert asked_for.result() is not None
    assert "checkpoint starting: immediate force wait" in cluster.log_text()
    assert await backups(lab) == 1
