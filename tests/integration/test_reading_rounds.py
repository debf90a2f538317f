"""The agent's own verification: what it reads when, and what it remembers, over days and lives."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.domain.backup_schedule import BackupSchedule
from agent.errors import RepositoryRefused
from agent.ports import Body, OpenObject
from agent.repository.keys import sentinel_key
from agent.repository.verification_record import VERIFIED, read_record
from agent.repository.wal_archive import WalArchive
from agent.storage.directory import DirectoryObjectStore
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import ReadingStatus
from agent.verify.content import Reading
from agent.verify.rounds import ReadingRounds, VerifyRules
from tests.support.backup_agent import HastyClock, MovedClock
from tests.support.until import until
from tests.support.walg_buckets import BUCKETS, WalgBucket, needs_walg_buckets

pytestmark = needs_walg_buckets

NAME = "pg17-zstd-delta"
ROUND = datetime(2031, 5, 6, 5, 0, tzinfo=UTC)
DAY = timedelta(days=1)
PLENTY = 1 << 40


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A repository of a full base backup and two deltas."""
    return Path(shutil.copytree(BUCKETS / NAME / "bucket", tmp_path / "bucket", copy_function=shutil.copyfile))


@pytest.fixture
def clock() -> MovedClock:
    """A clock that shows the hour before a round."""
    clock = MovedClock()
    clock.move_to(ROUND - timedelta(hours=1))
    return clock


class Store(DirectoryObjectStore):
    """`refuses` to write, and `hangs` when tars are read, if told so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.refuses = False
        self.hangs = False

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        if "tar_partitions" in key:
            await until(lambda: not self.hangs, what="the store to answer")
        async with super().open(key) as opened:
            yield opened

    async def put(self, key: str, body: Body, *, metadata: object = None) -> None:
        if self.refuses:
            raise RepositoryRefused("read only")
        await super().put(key, body)


class Agent:
    """The verifying part of one agent."""

    def __init__(self, bucket: Path, clock: MovedClock, bytes_per_day: int = PLENTY) -> None:
        objects = WalgBucket(NAME).objects
        self.clock = clock
        self.store = Store(bucket)
        self.may_run = True
        self.metrics = Metrics(CollectorRegistry())
        self.rounds = ReadingRounds(
            Reading(self.store, objects, WalArchive(self.store, objects), 1),
            VerifyRules(BackupSchedule("0 5 * * *"), bytes_per_day),
            lambda: self.may_run,
            HastyClock(clock),
            self.metrics,
        )

    @property
    def read_bytes(self) -> int:
        value = self.metrics.registry.get_sample_value("pitr_verify_bytes_total")
        assert value is not None
        return int(value)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Agent"]:
        task = asyncio.create_task(self.rounds.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def round_at(self, moment: datetime) -> ReadingStatus:
        """Let it be `moment`; return how it is when a round has ended since."""
        self.clock.move_to(moment)

        def has_ended() -> bool:
            ended = self.rounds.status().ended_at
            return ended is not None and ended >= moment

        await until(has_ended, what=f"a round at {moment}, not {self.rounds.status()}")
        return self.rounds.status()


def all_bytes(bucket: Path) -> int:
    """Return the size of everything that is read back."""
    tars = bucket.glob("basebackups_005/*/tar_partitions/*")
    return sum(path.stat().st_size for path in (*tars, *(bucket / "wal_005").iterdir()))


def size_of(path: Path) -> int:
    return path.stat().st_size


def newest_wal(bucket: Path) -> Path:
    return max((bucket / "wal_005").iterdir())


def part_of_a_delta(bucket: Path) -> Path:
    return next(bucket.glob("basebackups_005/*_D_*/tar_partitions/part_001.tar.zst"))


async def test_everything_is_read_once_a_week_and_new_wal_at_once(bucket: Path, clock: MovedClock) -> None:
    everything = all_bytes(bucket)
    late = newest_wal(bucket)
    size, kept = size_of(late), shutil.move(late, bucket.parent / late.name)
    async with Agent(bucket, clock).running() as agent:
        await until(lambda: agent.rounds.status().next_at == ROUND, what="the plan")
        assert agent.read_bytes == 0, "a new agent does not begin with a round"
        status = await agent.round_at(ROUND)
        assert (status.problems, status.next_at) == (0, ROUND + DAY)
        assert [not each.problems and each.verified_at is not None for each in status.backups] == [True] * 3
        read = agent.read_bytes
        assert read == everything - size
        shutil.move(kept, late)
        await agent.round_at(ROUND + DAY)
        assert agent.read_bytes == everything
    async with Agent(bucket, clock).running() as other:
        clock.move_to(ROUND + 4 * DAY - timedelta(hours=1))
        await other.round_at(ROUND + 4 * DAY)
        assert other.read_bytes == 0, "another agent knows what was verified"
        await other.round_at(ROUND + 9 * DAY)
        assert other.read_bytes == everything


async def test_the_days_bytes_are_kept_to_and_the_next_agent_goes_on(bucket: Path, clock: MovedClock) -> None:
    everything = all_bytes(bucket)
    limit = everything // 4
    total, days = 0, 0
    while total < everything:
        async with Agent(bucket, clock, limit).running() as agent:
            clock.move_to(ROUND + days * DAY - timedelta(hours=1))
            status = await agent.round_at(ROUND + days * DAY)
            assert status.problems == 0
            assert 0 < agent.read_bytes <= limit + everything // 3, "one object, or some WAL files, may exceed it"
            total, days = total + agent.read_bytes, days + 1
    assert total == everything, "nothing was read twice"
    assert days > 1
    assert all(each.verified_at is not None for each in status.backups)


async def test_damage_is_told_until_a_later_reading_finds_it_mended(bucket: Path, clock: MovedClock) -> None:
    part = part_of_a_delta(bucket)
    whole = part.read_bytes()
    part.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    async with Agent(bucket, clock).running() as agent:
        status = await agent.round_at(ROUND)
        assert status.problems == 1
        assert str(part.relative_to(bucket)) in status.first_problems[0]
        assert [bool(each.problems) for each in status.backups].count(True) == 1
    part.write_bytes(whole)
    async with Agent(bucket, clock).running() as agent:
        clock.move_to(ROUND + 2 * DAY - timedelta(hours=1))
        status = await agent.round_at(ROUND + 2 * DAY)
        assert status.problems == 1, "it was not read again yet"
        status = await agent.round_at(ROUND + 9 * DAY)
        assert status.problems == 0


async def test_a_base_backup_that_is_expired_meanwhile_is_no_damage(bucket: Path, clock: MovedClock) -> None:
    going = part_of_a_delta(bucket).parents[1]
    async with Agent(bucket, clock).running() as agent:
        agent.store.hangs = True
        clock.move_to(ROUND)
        await until(lambda: agent.rounds.status().running is not None, what="a round")
        (bucket / sentinel_key(going.name)).unlink()
        shutil.rmtree(going)
        agent.store.hangs = False
        status = await agent.round_at(ROUND)
    assert (status.problems, len(status.backups)) == (0, 2)


async def test_a_base_backup_goes_first(bucket: Path, clock: MovedClock) -> None:
    async with Agent(bucket, clock).running() as agent:
        agent.store.hangs = True
        clock.move_to(ROUND)
        await until(lambda: agent.rounds.status().running is not None, what="a round")
        agent.may_run = False
        await until(lambda: agent.rounds.status().running is None, what="it to make way")
        agent.store.hangs = False
        assert agent.rounds.status().ended_at is None
        agent.may_run = True
        assert (await agent.round_at(ROUND)).problems == 0


async def test_who_may_not_write_remembers_as_long_as_it_runs(bucket: Path, clock: MovedClock) -> None:
    agent = Agent(bucket, clock)
    agent.store.refuses = True
    async with agent.running():
        await agent.round_at(ROUND)
        read = agent.read_bytes
        status = await agent.round_at(ROUND + DAY)
        assert agent.read_bytes == read
        assert all(each.verified_at is not None for each in status.backups)
    name = status.backups[0].name
    assert not (bucket / VERIFIED.key(name)).exists()


async def test_a_record_that_cannot_be_understood_counts_as_none(bucket: Path) -> None:
    store = Store(bucket)
    name = WalgBucket(NAME).expected["backups"][0]["name"]
    for content in (b"{", json.dumps({"tars": 3}).encode()):
        await store.put(VERIFIED.key(name), content)
        assert (await read_record(store, name)).verified_at is None
