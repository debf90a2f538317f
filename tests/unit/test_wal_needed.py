"""Which WAL a base backup needs, and seeing it in the repository."""

import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.backup.wal_needed import needed_wal_files, wait_until_archived
from agent.domain.wal import parse_segment_name
from agent.errors import BackupFailed, RepositoryUnavailable
from agent.ports import ObjectInfo
from agent.repository.keys import wal_key
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore

MIB = 1 << 20
NAMES = ["0000000100000000000000FF", "000000010000000100000000", "0000000100000000000000FF.00000028.backup"]


class SteppingClock(SystemClock):
    """A clock on which sleeping takes no time but moves it on."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return self.passed

    async def sleep(self, seconds: float) -> None:
        self.passed += seconds


@given(
    st.integers(1, 1 << 31), st.integers(0, 1 << 40), st.integers(0, 1 << 26), st.sampled_from([MIB, 16 * MIB, 1 << 30])
)
def test_the_segments_cover_every_byte_from_start_to_stop_and_no_more(
    timeline: int, start: int, length: int, size: int
) -> None:
    *segments, history = needed_wal_files(timeline, start, start + length, size, has_history=False)
    starts = [parse_segment_name(name, size) for name in segments]
    assert all(found == timeline for found, _ in starts)
    assert starts[0][1] <= start < starts[0][1] + size
    assert starts[-1][1] < max(start + length, start + 1) <= starts[-1][1] + size
    assert [lsn for _, lsn in starts] == list(range(starts[0][1], starts[-1][1] + size, size))
    assert history == f"{segments[0]}.{start % size:08X}.backup"


def test_a_stop_on_a_boundary_does_not_wait_for_the_segment_that_begins_there() -> None:
    assert needed_wal_files(1, 0xFF000028, 0x100000000, 16 * MIB, has_history=False)[:-1] == [
        "0000000100000000000000FF"
    ]


def test_the_history_of_the_servers_timeline_is_needed_where_there_is_one() -> None:
    without = needed_wal_files(2, 0xFF000028, 0xFF000100, 16 * MIB, has_history=False)
    assert needed_wal_files(2, 0xFF000028, 0xFF000100, 16 * MIB, has_history=True) == ["00000002.history", *without]


async def store_of(*keys: str) -> MemoryObjectStore:
    store = MemoryObjectStore()
    for key in keys:
        await store.put(key, b"content")
    return store


@pytest.mark.parametrize("extension", ["", ".zst", ".lz4", "."])
async def test_wal_of_any_codec_counts(extension: str) -> None:
    store = await store_of(*(wal_key(name, extension) for name in NAMES))
    seen: list[int] = []
    await wait_until_archived(store, NAMES, 0, SystemClock(), seen.append)
    assert seen[-1] == 3


@pytest.mark.parametrize("extension", ["", ".zst"])
async def test_a_timeline_history_is_waited_for_and_found_without_listing_the_segments_after_it(extension: str) -> None:
    listed: list[str] = []

    class Counting(MemoryObjectStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            async for info in super().list(prefix, after=after):
                listed.append(info.key)
                yield info

    store, names = Counting(), needed_wal_files(2, 0xFF000028, 0xFF000100, 16 * MIB, has_history=True)
    for name in [*names[1:], *(f"0000000200000000000000{number:02X}" for number in range(90))]:
        await store.put(wal_key(name, extension), b"content")
    with pytest.raises(BackupFailed, match=r"1 of the 3 .* the first is 00000002\.history$"):
        await wait_until_archived(store, names, 0, SystemClock(), lambda _: None)
    await store.put(wal_key(names[0], extension), b"content")
    await wait_until_archived(store, names, 0, SystemClock(), lambda _: None)
    assert len(listed) < 20


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)))
async def test_the_files_may_arrive_in_any_order(order: tuple[str, ...]) -> None:
    store, clock = await store_of(), SteppingClock()
    arriving = list(order)

    def report(archived: int) -> None:
        if clock.passed > 10 * (4 - len(arriving)) and arriving:
            store._store(wal_key(arriving.pop(0), ".zst"), b"content", None)

    await wait_until_archived(store, NAMES, 3600, clock, report)
    assert 30 < clock.passed < 60


async def test_metadata_partial_and_foreign_objects_do_not_count() -> None:
    store = await store_of(
        wal_key(NAMES[0], ".json"), wal_key(NAMES[0] + ".partial", ".zst"), wal_key(NAMES[0], ".exe"), wal_key("x", "")
    )
    with pytest.raises(BackupFailed, match=rf"3 of the 3 WAL files .* after 60 s; the first is {NAMES[0]}$"):
        await wait_until_archived(store, NAMES, 60, SteppingClock(), lambda _: None)


async def test_a_store_that_cannot_be_listed_is_no_proof_of_absence() -> None:
    class Away(MemoryObjectStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            if prefix:
                raise RepositoryUnavailable("the store is away")
            yield ObjectInfo("", 0, self._clock.now())

    with pytest.raises(RepositoryUnavailable):
        await wait_until_archived(Away(), NAMES, 60, SteppingClock(), lambda _: None)
