"""Reading ahead of PostgreSQL: what a long backlog costs, and what shows of it."""

import asyncio
import os
import struct
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.app import Service
from agent.archive.archiver import WalArchiver
from agent.archive.look_ahead import LookAhead
from agent.budget import MemoryBudget
from agent.domain.wal import MAGIC_BY_MAJOR, segment_name
from agent.errors import WalConflict
from agent.ports import Body
from agent.postgres.data_directory import ArchiveStatus, DataDirectory
from agent.postgres.wal_file import FileState
from agent.repository.wal_archive import WalArchive
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.metrics import Metrics
from tests.support.object_formats import LZ4
from tests.support.wal_sources import WalBytes
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER

READY, WRITTEN = 50_000, 300
NAMES = [segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES) for number in range(1, READY + 1)]
HISTORY = "00000002.history"


class Guard:
    """All is of the cluster that the repository belongs to."""

    async def system_identifier(self) -> int:
        return SYSTEM_IDENTIFIER


class OneBatch(SystemClock):
    """Time goes by `step` seconds a look; nobody who sleeps wakes up, so that there is no second batch.

    ended: the first one has ended.
    """

    def __init__(self, step: float) -> None:
        self._step, self._now = step, 0.0
        self.ended = asyncio.Event()

    def monotonic(self) -> float:
        self._now += self._step
        return self._now

    async def sleep(self, seconds: float) -> None:
        self.ended.set()
        await asyncio.Event().wait()


class WatchedDirectory(DataDirectory):
    """Counts how often its archive status was listed, and its files looked at."""

    listings = looks = 0

    def archive_status(self) -> ArchiveStatus:
        self.listings += 1
        return super().archive_status()

    def wal_file_state(self, name: str) -> FileState | None:
        self.looks += 1
        return super().wal_file_state(name)

    def mark_ready(self, name: str, content: bytes, size: int) -> None:
        """Put a file of `size` bytes there that begins with `content`, and is a hole after it."""
        path = self.path / "pg_wal" / name
        with path.open("wb") as file:
            file.write(content)
            file.truncate(size)
        (path.parent / "archive_status" / f"{name}.ready").touch()

    def mark_segment_ready(self, number: int) -> None:
        header = (MAGIC_BY_MAJOR[15], 2, 1, number * SEGMENT_BYTES, 0, SYSTEM_IDENTIFIER, SEGMENT_BYTES, 8192)
        self.mark_ready(NAMES[number - 1], struct.pack("<HHIQI4xQII", *header), SEGMENT_BYTES)


class Watched(MemoryObjectStore):
    """Remembers the order in which objects came; `stored` is set at each."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.stored = asyncio.Condition()

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        async with self.stored:
            is_new = await super().put_if_absent(key, body, metadata=metadata)
            self.order.append(key.removeprefix("wal_005/").removesuffix(".lz4"))
            self.stored.notify_all()
        return is_new

    async def wait_for(self, names: set[str]) -> None:
        """Return when all of them are there."""
        async with asyncio.timeout(60), self.stored:
            await self.stored.wait_for(lambda: names <= set(self.order))


def archiver_of(store: Watched, directory: DataDirectory, *, concurrency: int) -> WalArchiver:
    """An archiver that PostgreSQL has asked."""
    archiver = WalArchiver(
        WalArchive(store, LZ4),
        directory,
        Guard(),
        concurrency=concurrency,
        budget=MemoryBudget(8 * SEGMENT_BYTES),
        clock=SystemClock(),
        metrics=Metrics(CollectorRegistry()),
    )
    archiver.was_asked = True
    return archiver


@asynccontextmanager
async def at_work(*services: Service) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(service.run()) for service in services]
        yield
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def look_ahead(
    store: Watched, directory: DataDirectory, clock: OneBatch, *, concurrency: int = 2
) -> AsyncIterator[LookAhead]:
    """An archiver that PostgreSQL has asked, and what keeps it busy, at work."""
    archiver = archiver_of(store, directory, concurrency=concurrency)
    ahead = LookAhead(archiver, directory, clock, Metrics(CollectorRegistry()))
    async with at_work(archiver, ahead):
        yield ahead


async def test_an_outage_s_backlog_is_listed_once_and_looked_at_once(tmp_path: Path) -> None:
    directory, store = WatchedDirectory(tmp_path), Watched()
    (tmp_path / "pg_wal" / "archive_status").mkdir(parents=True)
    for number in range(1, WRITTEN + 1):
        directory.mark_segment_ready(number)
    wal, status = tmp_path / "pg_wal", tmp_path / "pg_wal" / "archive_status"
    for name in NAMES[WRITTEN:]:  # empty: the batch ends at the first of them
        for path in (f"{wal}/{name}", f"{status}/{name}.ready"):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    try:
        async with look_ahead(store, directory, OneBatch(step=0)) as ahead:
            await store.wait_for(set(NAMES[:WRITTEN]))
            assert READY - WRITTEN <= ahead.backlog_files < READY - WRITTEN + 10
            _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert directory.listings == 1
    assert directory.looks <= READY + 2 * WRITTEN, "each file is looked at once, and again when it is uploaded"
    assert most_bytes < 64 << 20


async def test_what_becomes_ready_while_a_long_backlog_is_worked_off_shows_and_history_files_overtake(
    tmp_path: Path,
) -> None:
    directory, store = WatchedDirectory(tmp_path), Watched()
    (tmp_path / "pg_wal" / "archive_status").mkdir(parents=True)
    for number in range(1, 41):
        directory.mark_segment_ready(number)
    content = b"1\t0/9000000\tno recovery target specified\n"
    async with look_ahead(store, directory, OneBatch(step=10)):
        await store.wait_for({NAMES[0]})
        directory.mark_ready(HISTORY, content, len(content))
        await store.wait_for({HISTORY, *NAMES[:40]})
    assert store.order.index(HISTORY) < 39
    assert 1 < directory.listings < 40


async def test_a_clone_that_went_its_own_way_takes_no_name_of_the_original_s_next_files(tmp_path: Path) -> None:
    directory, store, clock = WatchedDirectory(tmp_path), Watched(), OneBatch(step=0)
    (tmp_path / "pg_wal" / "archive_status").mkdir(parents=True)
    for number in range(1, 10):
        directory.mark_segment_ready(number)
    archive = WalArchive(store, LZ4)
    for name in NAMES[:3]:
        content = (tmp_path / "pg_wal" / name).read_bytes()
        own = content[:-1] + b"x" if name == NAMES[2] else content
        await archive.store(archive.packer.pack(WalBytes(name, own), SYSTEM_IDENTIFIER))
    async with look_ahead(store, directory, clock, concurrency=8) as ahead:
        await clock.ended.wait()
        assert ahead.backlog_files == 7
    assert store.order == NAMES[:3]


class Held(Watched):
    """Stores the file `name` only when `released`; `asked` is set when it is to be."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.asked, self.released = asyncio.Event(), asyncio.Event()

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        if self.name in key:
            self.asked.set()
            await self.released.wait()
        return await super().put_if_absent(key, body, metadata=metadata)


async def test_what_was_under_way_beside_a_refused_file_does_not_hide_that_it_was_refused(tmp_path: Path) -> None:
    directory, store = WatchedDirectory(tmp_path), Held(NAMES[2])
    (tmp_path / "pg_wal" / "archive_status").mkdir(parents=True)
    directory.mark_segment_ready(1)
    archive = WalArchive(store, LZ4)
    archiver = archiver_of(store, directory, concurrency=8)
    async with at_work(archiver), asyncio.timeout(60):
        await archiver.archive(NAMES[0])
        assert archiver.at_once == 8
        for number in (2, 3):
            directory.mark_segment_ready(number)
        own = (tmp_path / "pg_wal" / NAMES[1]).read_bytes()[:-1] + b"x"
        await archive.store(archive.packer.pack(WalBytes(NAMES[1], own), SYSTEM_IDENTIFIER))
        under_way = archiver.start(NAMES[2])
        await store.asked.wait()
        with pytest.raises(WalConflict):
            await archiver.start(NAMES[1])
        store.released.set()
        await under_way
        assert archiver.at_once == 1
        directory.mark_segment_ready(4)
        await archiver.start(NAMES[3])
        assert archiver.at_once == 8


class FarAway(Watched):
    """Once it holds something, it stores files only together with `at_once - 1` others: all share a round trip."""

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self._together = asyncio.Barrier(at_once)

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        if self.order:
            await self._together.wait()
        return await super().put_if_absent(key, body, metadata=metadata)


async def test_while_postgresql_asks_for_one_file_after_the_other_a_round_trip_carries_several(tmp_path: Path) -> None:
    directory, store = WatchedDirectory(tmp_path), FarAway(at_once=4)
    (tmp_path / "pg_wal" / "archive_status").mkdir(parents=True)
    for number in range(1, 10):
        directory.mark_segment_ready(number)
    archiver = archiver_of(store, directory, concurrency=4)
    ahead = LookAhead(archiver, directory, OneBatch(step=0), Metrics(CollectorRegistry()))
    async with at_work(archiver, ahead), asyncio.timeout(60):
        for name in NAMES[:9]:
            await archiver.archive(name)
    assert set(store.order) == set(NAMES[:9])
