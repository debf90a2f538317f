"""The agent knows its window, and asks little to keep it."""

from datetime import timedelta

import pytest

from agent.archive.window_watch import WindowWatch
from agent.repository.wal_archive import WalArchive
from agent.storage.clock import SystemClock
from tests.support.large_archive import FIRST, LargeArchive
from tests.support.object_formats import PLAIN


@pytest.fixture
async def archive() -> LargeArchive:
    """5,000 segments with five base backups."""
    archive = LargeArchive(5_000, backup_every=1_000)
    await archive.prepare()
    return archive


def watch_on(archive: LargeArchive) -> WindowWatch:
    return WindowWatch(archive, WalArchive(archive, PLAIN), SystemClock())


async def test_what_is_new_is_seen_with_a_few_requests(archive: LargeArchive) -> None:
    watch = watch_on(archive)
    assert watch.status() is None
    await watch.refresh()
    first = watch.status()
    assert first is not None
    assert first.from_time == archive.moment(FIRST)
    archive.grow(2)
    archive.requests.clear()
    await watch.refresh()
    second = watch.status()
    assert second is not None
    assert first.to_time is not None
    assert second.to_time is not None
    assert first.to_time < second.to_time <= first.to_time + timedelta(minutes=3)
    assert sum(archive.requests.values()) <= 5
    assert archive.requests["open"] == 0


async def test_a_base_backup_that_is_removed_moves_the_window(archive: LargeArchive) -> None:
    watch = watch_on(archive)
    await watch.refresh()
    await archive.remove_oldest_backup()
    await watch.refresh()
    status = watch.status()
    assert status is not None
    assert status.from_time == archive.moment(FIRST + 1_000)


async def test_an_empty_repository_has_no_window() -> None:
    archive = LargeArchive(0, backup_every=1)
    watch = watch_on(archive)
    await watch.refresh()
    status = watch.status()
    assert status is not None
    assert (status.from_time, status.to_time, status.gaps) == (None, None, 0)
