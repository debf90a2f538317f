"""What recovery is handed: WAL that was checked to its last byte, in bounded memory, and nothing in front of a hole."""

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.budget import MemoryBudget
from agent.domain.wal import segment_name
from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryUnavailable
from agent.fetch.fetcher import AWAITED_SECONDS, WalFetcher
from agent.fetch.read_ahead import DOWNLOAD_MEMORY_BYTES, ReadAhead
from agent.fetch.spool import Spool
from agent.ports import ObjectInfo
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.settings import Compression
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.metrics import Metrics
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter

NAMES = [f"00000001000000000000000{number}" for number in range(1, 6)]


class LaterClock(SystemClock):
    """One that can be set on."""

    later_seconds = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.later_seconds


class Archive:
    """An archive in memory, and the fetcher that reads it."""

    def __init__(self, method: Compression = Compression.NONE, store: MemoryObjectStore | None = None) -> None:
        self.store = store or MemoryObjectStore()
        self.objects = ObjectFormat(method, None)
        self.archive = WalArchive(self.store, self.objects)
        self.budget = MemoryBudget(DOWNLOAD_MEMORY_BYTES)
        self.clock, self.registry = LaterClock(), CollectorRegistry()
        metrics = Metrics(self.registry)
        ahead = ReadAhead(self.archive, Spool(Path("/nowhere")), self.budget, 3)
        self.fetcher = WalFetcher(self.archive, ahead, self.budget, self.clock, metrics)

    def awaited_since(self) -> float | None:
        """What the metric says."""
        return self.registry.get_sample_value("pitr_fetch_awaited_since_timestamp_seconds")

    async def keep(self, name: str, content: bytes) -> None:
        """Store a segment as WAL-G does, without metadata."""
        await self.store.put(f"wal_005/{name}{self.objects.extension}", self.objects.encode(content))

    async def fetch(self, name: str) -> tuple[bytes, int] | RepositoryError | None:
        """Return what was sent and what was to be sent; the error that ended it; None if the file is absent."""
        sent = bytearray()
        try:
            async with self.fetcher.open(name, SYSTEM_IDENTIFIER) as stream:
                if stream is None:
                    return None
                async for piece in stream.pieces:
                    sent += piece
                return bytes(sent), stream.size
        except RepositoryError as error:
            assert len(sent) < SEGMENT_BYTES, "a file that is whole would be replayed"
            return error


def wal(segments: int, *, segment_bytes: int = SEGMENT_BYTES) -> list[bytes]:
    writer = WalWriter(segment_bytes, segment_bytes=segment_bytes)
    while writer.lsn < (segments + 1) * segment_bytes:
        writer.filler(7000)
    return writer.segments()


async def test_segments_are_handed_out_one_after_the_other_and_the_end_is_told() -> None:
    archive, segments = Archive(), wal(2)
    for name, content in zip(NAMES, segments, strict=False):
        await archive.keep(name, content)
    for name, content in zip(NAMES, segments, strict=False):
        assert await archive.fetch(name) == (content, SEGMENT_BYTES)
    assert await archive.fetch(NAMES[len(segments)]) is None
    assert archive.budget.used == 0


async def test_a_damaged_segment_is_read_again_and_never_sent_whole() -> None:
    archive, content = Archive(), bytearray(wal(1)[0])
    content[-30_000] ^= 1
    await archive.keep(NAMES[0], bytes(content))
    await archive.keep(NAMES[1], wal(1)[1])
    first, second = await archive.fetch(NAMES[0]), await archive.fetch(NAMES[0])
    assert isinstance(first, RepositoryUnavailable), "it may have been damaged on its way"
    assert isinstance(second, RepositoryCorrupt)
    await archive.keep(NAMES[0], wal(1)[0])
    assert await archive.fetch(NAMES[0]) == (wal(1)[0], SEGMENT_BYTES), "it was mended"


async def test_a_segment_that_goes_on_after_its_end_is_not_whole_before_it_is_checked() -> None:
    archive, content = Archive(), bytearray(wal(1)[0])
    content[-30_000] ^= 1
    await archive.keep(NAMES[0], bytes(content) + bytes(3 << 20))
    assert isinstance(await archive.fetch(NAMES[0]), RepositoryUnavailable)
    assert isinstance(await archive.fetch(NAMES[0]), RepositoryCorrupt)


async def test_the_last_segment_of_a_crashed_server_is_handed_out_unless_there_is_later_wal() -> None:
    archive, segments = Archive(), wal(2)
    ended = segments[1][: SEGMENT_BYTES // 2] + bytes(SEGMENT_BYTES // 2)
    await archive.keep(NAMES[0], segments[0])
    await archive.keep(NAMES[1], ended)
    assert await archive.fetch(NAMES[1]) == (ended, SEGMENT_BYTES)
    await archive.keep(NAMES[2], segments[2])
    outcome = await archive.fetch(NAMES[1])
    assert isinstance(outcome, RepositoryUnavailable)
    assert f'its WAL ends at 0/280000, but "{NAMES[2]}" after it is in the archive' in outcome.message
    assert isinstance(await archive.fetch(NAMES[1]), RepositoryCorrupt)


async def test_a_record_across_two_segments_is_checked_when_the_second_is_handed_out() -> None:
    archive, segments = Archive(), wal(2)
    second = bytearray(segments[1])
    second[41] ^= 1  # right after the header: of the record that began in the first
    await archive.keep(NAMES[0], segments[0])
    await archive.keep(NAMES[1], bytes(second))
    assert await archive.fetch(NAMES[0]) == (segments[0], SEGMENT_BYTES)
    outcome = await archive.fetch(NAMES[1])
    assert isinstance(outcome, RepositoryUnavailable)
    assert "continues into it has a wrong CRC" in outcome.message


LINE = b"1\t0/9000000\tno recovery target specified\n"


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [(NAMES[0], wal(1)[0], wal(1)[0][:-8] + b"of other"), ("00000002.history", LINE, LINE + b"\n")],
)
async def test_of_two_contents_under_one_name_neither_is_handed_out(name: str, ours: bytes, theirs: bytes) -> None:
    """Two servers that compress differently, each of which stored its own."""
    others = ObjectFormat(Compression.ZSTD, None)
    same, other = Archive(Compression.LZ4), Archive(Compression.LZ4)
    await same.keep(name, ours)
    await same.store.put(f"wal_005/{name}.zst", others.encode(ours))
    assert await same.fetch(name) == (ours, len(ours))
    await other.keep(name, ours)
    await other.store.put(f"wal_005/{name}.zst", others.encode(theirs))
    outcome = await other.fetch(name)
    assert isinstance(outcome, RepositoryCorrupt)
    assert f"wal_005/{name}.lz4 of " in outcome.message
    assert f" and wal_005/{name}.zst of " in outcome.message


async def test_a_hole_is_not_the_end_of_the_wal() -> None:
    archive, segments = Archive(), wal(2)
    await archive.keep(NAMES[2], segments[2])
    outcome = await archive.fetch(NAMES[1])
    assert isinstance(outcome, RepositoryUnavailable)
    assert "is missing from the archive" in outcome.message


async def test_wal_that_another_timeline_goes_on_from_is_a_hole_and_what_comes_after_its_beginning_is_not() -> None:
    segments, listed = wal(2), 0

    class Counted(MemoryObjectStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            nonlocal listed
            async for info in super().list(prefix, after=after):
                listed += 1
                yield info

    archive = Archive(store=Counted())
    await archive.keep(NAMES[0], segments[0])
    for timeline in (2, 3):  # of the first nobody knows where it is from
        for number in range(3, 1003):
            await archive.keep(segment_name(timeline, number * SEGMENT_BYTES, SEGMENT_BYTES), segments[2])
    await archive.keep("00000003.history", f"1\t0/{3 * SEGMENT_BYTES:X}\tno recovery target specified\n".encode())
    outcome = await archive.fetch(NAMES[1])
    assert isinstance(outcome, RepositoryUnavailable)
    assert f'"{NAMES[1]}" is missing from the archive, but "00000003' in outcome.message
    assert await archive.fetch(NAMES[2]) is None
    assert listed < 100, "a name for each look, and not each name"


async def test_a_lost_history_file_is_not_the_end_of_the_timelines() -> None:
    archive, content = Archive(), wal(1)[0]
    await archive.keep(NAMES[0], content)
    assert await archive.fetch("00000002.history") is None
    await archive.keep("00000002" + NAMES[1][8:], content)
    outcome = await archive.fetch("00000002.history")
    assert isinstance(outcome, RepositoryUnavailable)
    assert "00000002.history" in outcome.message
    assert await archive.fetch("00000001.history") is None
    assert await archive.fetch("00000003.history") is None


async def test_a_repository_begun_on_a_later_timeline_has_no_earlier_history() -> None:
    archive = Archive()
    await archive.keep("00000003" + NAMES[0][8:], wal(1)[0])
    for number in range(1, 5):
        assert await archive.fetch(f"0000000{number}.history") is None


@pytest.mark.parametrize("method", [Compression.ZSTD, Compression.LZ4])
async def test_a_large_segment_takes_no_more_memory_than_a_small_one(method: Compression) -> None:
    archive, large = Archive(method), 64 << 20
    writer = WalWriter(large, segment_bytes=large)
    while writer.lsn < 2 * large - (1 << 20):
        writer.filler(60_000)
    content = writer.segments()[0]
    await archive.keep(NAMES[0], content)
    async with AsyncExitStack() as stack:
        stream = await stack.enter_async_context(archive.fetcher.open(NAMES[0], SYSTEM_IDENTIFIER))
        assert stream is not None
        assert archive.budget.used == DOWNLOAD_MEMORY_BYTES
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        sizes = [len(piece) async for piece in stream.pieces]
        assert sum(sizes) == stream.size == large
        assert tracemalloc.get_traced_memory()[1] < DOWNLOAD_MEMORY_BYTES
    assert archive.budget.used == 0


async def test_a_segment_is_awaited_since_the_first_attempt_though_a_standby_asks_for_histories_in_between() -> None:
    archive, segments = Archive(), wal(2)
    await archive.keep(NAMES[1], segments[1])
    since = set()
    for attempt in (1, 2, 3):
        assert isinstance(await archive.fetch(NAMES[0]), RepositoryUnavailable)
        assert await archive.fetch("00000002.history") is None
        assert archive.fetcher.awaited is not None
        assert (archive.fetcher.awaited.name, archive.fetcher.awaited.attempts) == (NAMES[0], attempt)
        since.add(archive.fetcher.awaited.since)
    assert {moment.timestamp() for moment in since} == {archive.awaited_since()}
    assert await archive.fetch(NAMES[1]) is not None
    assert archive.awaited_since() == 0, "recovery has come further"


async def test_what_nobody_asks_for_any_more_is_not_awaited() -> None:
    archive = Archive()
    await archive.keep(NAMES[1], wal(2)[1])
    assert isinstance(await archive.fetch(NAMES[0]), RepositoryUnavailable)
    archive.clock.later_seconds = AWAITED_SECONDS
    assert archive.awaited_since() == 0, "a standby that streams would be called stuck"
    assert isinstance(await archive.fetch(NAMES[0]), RepositoryUnavailable)
    assert archive.fetcher.awaited is not None
    assert archive.fetcher.awaited.attempts == 1
