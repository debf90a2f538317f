"""Nothing is added to a repository that has another key than the settings; damage does not stop archiving."""

import os

import pytest

from agent.errors import WrongKey
from agent.repository.key_check import refuse_other_key
from agent.repository.object_format import ObjectFormat
from agent.settings import Compression
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import KEY, OTHER_KEY, ZSTD
from tests.support.wal_writer import RM_XLOG, WalWriter

ENCRYPTED, OTHER = ObjectFormat(Compression.LZ4, KEY), ObjectFormat(Compression.ZSTD, OTHER_KEY)
SMALL, LARGE = bytes(1 << 20), os.urandom(2 << 20)


async def store_of(*bodies: bytes, extension: str = ".lz4") -> MemoryObjectStore:
    """Return a store with the WAL files 1, 2, ... of these bodies, and what else is found beside them."""
    store = MemoryObjectStore()
    await store.put("wal_005/000000010000000000000000_delta.lz4", b"")
    await store.put("wal_005/00000001000000000000000.json", b"{}")
    for number, body in enumerate(bodies, 1):
        await store.put(f"wal_005/{number:024X}{extension}", body)
    return store


@pytest.mark.parametrize("objects", [ENCRYPTED, OTHER, ZSTD])
async def test_an_empty_repository_accepts_any_key(objects: ObjectFormat) -> None:
    await refuse_other_key(await store_of(), objects)


@pytest.mark.parametrize("content", [SMALL, LARGE])
@pytest.mark.parametrize("objects", [ENCRYPTED, ZSTD])
async def test_a_repository_of_the_same_key_is_accepted(objects: ObjectFormat, content: bytes) -> None:
    await refuse_other_key(await store_of(objects.encode(content), extension=objects.extension), objects)


@pytest.mark.parametrize("content", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("written", "objects", "told"),
    [
        (ENCRYPTED, OTHER, "was not encrypted with this key"),
        (ENCRYPTED, ZSTD, "no key is set"),
        (ZSTD, ENCRYPTED, "is not encrypted, but"),
    ],
    ids=["another key", "no key", "not encrypted"],
)
async def test_another_key_is_refused(written: ObjectFormat, objects: ObjectFormat, told: str, content: bytes) -> None:
    store = await store_of(*[written.encode(content)] * 2, extension=written.extension)
    with pytest.raises(WrongKey, match=f"wal_005/{1:024X}{written.extension} .*{told}"):
        await refuse_other_key(store, objects)


async def test_what_is_encrypted_and_not_compressed_is_told_where_no_key_is_set() -> None:
    encrypted, plain = ObjectFormat(Compression.NONE, KEY), ObjectFormat(Compression.NONE, None)
    writer = WalWriter()
    writer.record(RM_XLOG, 0, b"anything")
    (segment,) = writer.segments()
    await refuse_other_key(await store_of(segment, extension=""), plain)
    with pytest.raises(WrongKey, match="does not begin as WAL does"):
        await refuse_other_key(await store_of(encrypted.encode(segment), extension=""), plain)


async def test_damaged_files_before_a_good_one_are_passed_over() -> None:
    good = ENCRYPTED.encode(LARGE)
    await refuse_other_key(await store_of(b"", os.urandom(100_000), good), ENCRYPTED)


async def test_damaged_files_that_say_nothing_of_the_key_do_not_stop_archiving() -> None:
    await refuse_other_key(await store_of(b"", ENCRYPTED.encode(SMALL)[:20]), ENCRYPTED)
