"""When transactions ended in a segment is stored with it, and read back without it."""

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis.strategies import builds, datetimes, dictionaries, integers, just, none, one_of, sampled_from, text

from agent.domain.wal_times import SegmentTimes, TransactionEnd, segment_times
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_metadata import FIRST_COMMIT, LAST_COMMIT, read_times, wal_metadata
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import LZ4
from tests.support.wal_sources import WalBytes
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter

NAME = "000000010000000000000001"
WAL_TIME = 848_000_000_123_456
ENDS = builds(
    TransactionEnd,
    integers(0, 2**64 - 1),
    datetimes(datetime(1000, 1, 1), timezones=just(UTC)),  # noqa: DTZ001 - hypothesis adds the zone
)


def segment() -> bytes:
    writer = WalWriter()
    writer.transaction(0x00, 700, WAL_TIME)
    writer.transaction(0x20, 701, WAL_TIME + 1_000_000)
    writer.switch()
    return writer.segments()[0]


def idle_segment() -> bytes:
    writer = WalWriter()
    writer.switch()
    return writer.segments()[0]


async def archived(name: str, content: bytes) -> tuple[WalArchive, Mapping[str, str]]:
    """Store one WAL file; return the archive, and the metadata that the store has of it."""
    store = MemoryObjectStore()
    archive = WalArchive(store, LZ4)
    await archive.store(archive.packer.pack(WalBytes(name, content), SYSTEM_IDENTIFIER))
    (item,) = await archive.list_files()
    info = await store.head(item.key)
    assert info is not None
    return archive, info.metadata


async def test_an_archived_segment_tells_its_first_and_last_commit_without_being_read() -> None:
    archive, metadata = await archived(NAME, segment())
    assert metadata[FIRST_COMMIT] == "2026-11-14T19:33:20.123456Z 0/100028"
    assert metadata[LAST_COMMIT].startswith("2026-11-14T19:33:21.123456Z 0/1000")
    assert await archive.times(NAME) == segment_times(segment())


async def test_a_segment_without_commits_is_told_from_one_that_says_nothing() -> None:
    archive, metadata = await archived(NAME, idle_segment())
    assert (metadata[FIRST_COMMIT], metadata[LAST_COMMIT]) == ("none", "none")
    assert await archive.times(NAME) == SegmentTimes(None, None)


@pytest.mark.parametrize("content", [segment()[:64] + bytes(SEGMENT_BYTES - 64), b"no segment at all"])
async def test_a_segment_that_cannot_be_read_is_stored_without_times(content: bytes) -> None:
    archive, metadata = await archived(NAME, content)
    assert not {FIRST_COMMIT, LAST_COMMIT} & metadata.keys()
    assert await archive.times(NAME) is None


async def test_a_partial_segment_has_no_times() -> None:
    _, metadata = await archived(f"{NAME}.partial", segment())
    assert not {FIRST_COMMIT, LAST_COMMIT} & metadata.keys()


async def test_times_are_found_under_another_extension_and_absent_ones_are_none() -> None:
    archive, metadata = await archived(NAME, segment())
    other = MemoryObjectStore()
    assert await WalArchive(other, LZ4).times(NAME) is None
    await other.put(f"wal_005/{NAME}.br", b"", metadata=metadata)
    assert await WalArchive(other, LZ4).times(NAME) == await archive.times(NAME)


@given(one_of(none(), ENDS), one_of(none(), ENDS))
def test_times_survive_the_way_through_metadata_which_stays_small(
    first: TransactionEnd | None, last: TransactionEnd | None
) -> None:
    metadata = wal_metadata("0" * 64, 1 << 30, 2**64 - 1, SegmentTimes(first, last))
    assert read_times(metadata) == SegmentTimes(first, last)
    assert sum(len(key) + len(value) for key, value in metadata.items()) < 400


@given(dictionaries(sampled_from([FIRST_COMMIT, LAST_COMMIT]), one_of(text(max_size=40), just("none"))))
def test_metadata_in_another_form_tells_nothing(metadata: dict[str, str]) -> None:
    assert read_times(metadata) in (None, SegmentTimes(None, None))
