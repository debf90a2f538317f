"""The agent looks by itself whether its repository is whole."""

import shutil
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.errors import RepositoryUnavailable
from agent.ports import ObjectInfo
from agent.repository.wal_archive import WalArchive
from agent.storage.clock import SystemClock
from agent.storage.directory import DirectoryObjectStore
from agent.verify.watch import VerifyWatch
from tests.support.walg_buckets import BUCKETS, WalgBucket, needs_walg_buckets

pytestmark = needs_walg_buckets
NAME = "pg17-zstd-delta"


class Interval(SystemClock):
    """A clock whose sleeps are over at once; meanwhile something happens."""

    def __init__(self) -> None:
        self.happens: Callable[[], object] = lambda: None

    async def sleep(self, seconds: float) -> None:
        del seconds
        self.happens()


class Store(DirectoryObjectStore):
    """Does not answer while it `is_away`; its clock is `ahead`."""

    is_away = False
    ahead = timedelta()

    async def time(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        if self.is_away:
            raise RepositoryUnavailable("the store does not answer")
        async for info in super().list(prefix, after=after):
            yield info


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A copy of a repository that WAL-G wrote."""
    copy = tmp_path / "bucket"
    shutil.copytree(BUCKETS / NAME / "bucket", copy, copy_function=shutil.copyfile)
    return copy


@pytest.fixture
def clock() -> Interval:
    return Interval()


@pytest.fixture
def store(bucket: Path) -> Store:
    return Store(bucket)


@pytest.fixture
def watch(store: Store, clock: Interval) -> VerifyWatch:
    return VerifyWatch(store, WalArchive(store, WalgBucket(NAME).objects), clock)


def a_tar(bucket: Path) -> Path:
    return min(bucket.rglob("part_*.tar*"))


async def test_a_whole_repository_is_told_by_base_backup(watch: VerifyWatch) -> None:
    assert watch.status().at is None
    assert await watch.verify()
    found = watch.status()
    assert found.at is not None
    assert (found.problems, found.failure) == (0, None)
    assert set(found.whole) == {each["name"] for each in WalgBucket(NAME).expected["backups"]}


async def test_what_is_missing_is_told(watch: VerifyWatch, bucket: Path) -> None:
    tar = a_tar(bucket)
    tar.unlink()
    assert await watch.verify()
    found = watch.status()
    assert found.problems >= 1
    assert any(tar.name in problem for problem in found.first_problems)
    assert tar.parents[1].name not in found.whole


async def test_what_is_there_at_a_second_look_was_never_missing(
    watch: VerifyWatch, bucket: Path, clock: Interval, tmp_path: Path
) -> None:
    tar = a_tar(bucket)
    aside = tmp_path / "aside"
    tar.rename(aside)
    clock.happens = lambda: aside.exists() and aside.rename(tar)
    assert await watch.verify()
    assert watch.status().problems == 0


async def test_a_store_that_cannot_be_asked_changes_nothing_but_the_failure(watch: VerifyWatch, store: Store) -> None:
    await watch.verify()
    before = watch.status()
    store.is_away = True
    assert not await watch.verify()
    after = watch.status()
    assert after.failure is not None
    assert (after.at, after.whole, after.problems) == (before.at, before.whole, 0)


async def test_a_clock_that_is_wrong_is_told_and_ends_no_service(watch: VerifyWatch, store: Store) -> None:
    store.ahead = timedelta(minutes=6)
    assert not await watch.verify()
    failure = watch.status().failure
    assert failure is not None
    assert "this machine's" in failure.reason
