"""Storing WAL files: what is said to be archived is there."""

import re
import tracemalloc
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from agent.domain.timeline import Ancestor
from agent.domain.wal_search import ends_of
from agent.errors import RepositoryCorrupt, RepositoryUnavailable, WalConflict
from agent.ports import Body
from agent.repository.object_format import ObjectFormat
from agent.repository.owner import repository_owner
from agent.repository.survey import survey_repository
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import list_wal
from agent.repository.wal_packing import Packed, WalPacker
from agent.settings import Compression
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from tests.support.wal_sources import WalBytes
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter, to_wal_time

NAME = "00000002.history"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
CONTENT = b"1\t0/9000000\tno recovery target specified\n"


def archive_on(store: MemoryObjectStore, method: Compression = Compression.ZSTD) -> WalArchive:
    return WalArchive(store, ObjectFormat(method, None))


def packed(archive: WalArchive, content: bytes = CONTENT) -> Packed:
    return archive.packer.pack(WalBytes(NAME, content), None)


class SaysItIsThere(MemoryObjectStore):
    """A store from which the object that was in the way has gone when one looks."""

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        return False


async def test_what_was_in_the_way_but_cannot_be_seen_is_not_taken_for_archived() -> None:
    archive = archive_on(SaysItIsThere())
    with pytest.raises(RepositoryUnavailable, match=NAME):
        await archive.store(packed(archive))


async def test_the_same_content_under_another_extension_is_success_and_another_content_is_refused() -> None:
    store = MemoryObjectStore()
    older, newer = archive_on(store, Compression.LZ4), archive_on(store)
    assert not (await older.store(packed(older))).already
    assert (await newer.store(packed(newer))).already
    with pytest.raises(WalConflict, match="other content since"):
        await newer.store(packed(newer, CONTENT + b"\n"))
    assert [info.key async for info in store.list("")] == [f"wal_005/{NAME}.lz4"]


SEGMENT_NAME = "000000010000000000000001"
WITHOUT_CHECKSUM = [Compression.NONE, Compression.BROTLI, Compression.LZMA]


def segment_of_wal() -> bytes:
    writer = WalWriter()
    while writer.lsn < 2 * SEGMENT_BYTES:
        writer.filler(1000)
    return writer.segments()[0]


async def stored_by_walg(content: bytes, method: Compression) -> WalArchive:
    """Return an archive that holds `content` as a segment without metadata, as WAL-G and directories leave it."""
    store, objects = MemoryObjectStore(), ObjectFormat(method, None)
    await store.put(f"wal_005/{SEGMENT_NAME}{objects.extension}", objects.encode(content))
    return WalArchive(store, objects)


@pytest.mark.parametrize("method", Compression)
async def test_good_wal_is_handed_out_whoever_stored_it(method: Compression) -> None:
    content = segment_of_wal()
    assert await (await stored_by_walg(content, method)).fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER) == content


@pytest.mark.parametrize("method", WITHOUT_CHECKSUM)
async def test_a_flipped_byte_that_no_checksum_tells_is_found_in_the_records(method: Compression) -> None:
    content = bytearray(segment_of_wal())
    content[500_000] ^= 0xFF
    archive = await stored_by_walg(bytes(content), method)
    with pytest.raises(RepositoryCorrupt, match=r"cannot be replayed: its WAL is damaged at 0/17A0"):
        await archive.fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER)


async def copied_without_metadata(name: str, content: bytes, method: Compression) -> tuple[MemoryObjectStore, str]:
    """Return a store to which what we stored was copied by a tool that leaves metadata behind, and the object's key."""
    original, copy = MemoryObjectStore(), MemoryObjectStore()
    archive = WalArchive(original, ObjectFormat(method, None), digest_is_kept=True)
    await archive.store(archive.packer.pack(WalBytes(name, content), SYSTEM_IDENTIFIER))
    (key,) = [info.key async for info in original.list("")]
    stored = await original.get(key)
    assert stored is not None
    assert stored.info.metadata
    await copy.put(key, stored.body)
    return copy, key


def flipped(content: bytes, position: int) -> bytes:
    result = bytearray(content)
    result[position] ^= 1
    return bytes(result)


async def altered(store: MemoryObjectStore, key: str, position: int) -> None:
    stored = await store.get(key)
    assert stored is not None
    await store.put(key, flipped(stored.body, position))


@pytest.mark.parametrize("method", Compression)
async def test_a_segment_whose_metadata_was_lost_is_proven_by_its_records(method: Compression) -> None:
    content = segment_of_wal()
    store, _ = await copied_without_metadata(SEGMENT_NAME, content, method)
    assert await archive_on(store).fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER) == content
    damaged, _ = await copied_without_metadata(SEGMENT_NAME, flipped(content, 500_000), method)
    with pytest.raises(RepositoryCorrupt, match="cannot be replayed: its WAL is damaged at"):
        await archive_on(damaged).fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER)


async def test_a_history_file_is_read_whatever_the_encoding_of_the_name_in_it() -> None:
    archive = archive_on(MemoryObjectStore())
    await archive.store(packed(archive, b'1\t0/9000000\tat restore point "before \xe9t\xe9"\n'))
    assert await archive.histories() == {2: (Ancestor(1, 0x9000000),)}


@pytest.mark.parametrize("method", [Compression.ZSTD, Compression.LZ4])
async def test_a_history_file_whose_metadata_was_lost_is_proven_by_its_checksum(method: Compression) -> None:
    store, key = await copied_without_metadata(NAME, CONTENT, method)
    assert await archive_on(store).fetch(NAME) == CONTENT
    await altered(store, key, position=-8 if method == Compression.LZ4 else -6)
    with pytest.raises(RepositoryCorrupt, match="is damaged"):
        await archive_on(store).fetch(NAME)


@pytest.mark.parametrize("method", Compression)
async def test_a_digest_that_is_not_of_the_content_is_refused_whatever_the_codec_says(method: Compression) -> None:
    archive = archive_on(store := MemoryObjectStore(), method)
    await store.put(
        f"wal_005/{SEGMENT_NAME}{ObjectFormat(method, None).extension}",
        ObjectFormat(method, None).encode(segment_of_wal()),
        metadata={"pitr-content-blake3": "0" * 64},
    )
    with pytest.raises(RepositoryCorrupt, match="does not have the content that was archived"):
        await archive.fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER)


ZSTD_FRAME = re.compile(rb"\x28\xb5\x2f\xfd")


def test_where_no_digest_is_kept_one_checksum_holds_a_segment_together() -> None:
    packer = WalPacker(ObjectFormat(Compression.ZSTD, None), digest_is_kept=False)
    body = packer.pack(WalBytes(SEGMENT_NAME, segment_of_wal()), SYSTEM_IDENTIFIER).body
    assert len(ZSTD_FRAME.findall(body)) == 1, "a frame's own checksum would not tell that two of them changed places"


@pytest.mark.parametrize("has_metadata", [True, False])
async def test_a_segment_cut_between_two_of_its_frames_is_refused(has_metadata: bool) -> None:
    objects = ObjectFormat(Compression.ZSTD, None)
    whole = WalPacker(objects, digest_is_kept=True).pack(WalBytes(SEGMENT_NAME, segment_of_wal()), SYSTEM_IDENTIFIER)
    ends = [match.start() for match in ZSTD_FRAME.finditer(whole.body)][1:]
    assert len(ends) == 10, "to the codec each of them is the end of a whole object"
    for end in ends:
        store = MemoryObjectStore()
        metadata = whole.description.metadata if has_metadata else None
        await store.put(f"wal_005/{SEGMENT_NAME}.zst", whole.body[:end], metadata=metadata)
        with pytest.raises(RepositoryCorrupt, match=r"is not the WAL segment|not have the content that was archived"):
            await archive_on(store).fetch(SEGMENT_NAME, SYSTEM_IDENTIFIER)


async def test_whose_a_repository_of_large_segments_is_and_when_transactions_ended_takes_little_memory() -> None:
    store, large = MemoryObjectStore(), 64 << 20
    archive, objects = archive_on(store), ObjectFormat(Compression.ZSTD, None)
    writer = WalWriter(large, segment_bytes=large)
    while writer.lsn < 2 * large - (1 << 20):
        writer.filler(60_000)
    writer.transaction(0, 7, to_wal_time(NOON))
    writer.switch()
    await store.put(f"wal_005/{SEGMENT_NAME}.zst", objects.encode(writer.segments()[0]))
    tracemalloc.start()
    try:
        assert await repository_owner(store, archive) == SYSTEM_IDENTIFIER
        (ends,) = await (await list_wal(archive, [])).index.follow(ends_of([SEGMENT_NAME]))
        assert ends.last is not None
        assert ends.last.time == NOON
        assert (await survey_repository(store, archive, SystemClock())).inventory.segment_bytes == large
        assert tracemalloc.get_traced_memory()[1] < large // 4
    finally:
        tracemalloc.stop()


async def test_a_history_file_that_expands_beyond_any_is_refused_with_little_memory() -> None:
    store = MemoryObjectStore()
    compressor = ObjectFormat(Compression.ZSTD, None).encoder()
    bomb = b"".join(compressor.encode(bytes(1 << 20)) for _ in range(64)) + compressor.flush()
    await store.put(f"wal_005/{NAME}.zst", bomb)
    tracemalloc.start()
    try:
        with pytest.raises(RepositoryCorrupt, match=rf"{NAME}\.zst expands to more than"):
            await archive_on(store).histories([NAME])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
