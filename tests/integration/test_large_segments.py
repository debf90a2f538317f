"""A WAL segment too large to be packed as a whole goes to a real S3 server in parts, once, and comes back."""

import os
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.archive.uploader import WalUploader
from agent.budget import MemoryBudget
from agent.domain.wal_times import segment_times
from agent.errors import WalConflict, WalRefused
from agent.ports import ObjectStore
from agent.postgres.data_directory import DataDirectory
from agent.postgres.wal_file import WalFile
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.settings import Compression, load_settings
from agent.storage.clock import SystemClock
from agent.storage.connect import open_store
from agent.telemetry.metrics import Metrics
from tests.support.wal_writer import SYSTEM_IDENTIFIER, WalWriter

SEGMENT_BYTES = 64 << 20
NAME = "000000010000000000000001"


def content() -> bytes:
    """A segment with two commits and a switch, and after it, where nobody looks, what no compressor makes smaller."""
    writer = WalWriter(SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
    writer.transaction(0x00, 700, 848_000_000_000_000)
    writer.transaction(0x00, 701, 848_000_000_000_001)
    writer.switch()
    segment = bytearray(writer.segments()[0])
    segment[1 << 20 : 60 << 20] = os.urandom(59 << 20)
    return bytes(segment)


@pytest.fixture(scope="module")
def segment() -> bytes:
    return content()


class ChangingDirectory(DataDirectory):
    """Its files are changed when they are opened for the second time, by whoever does not change their times."""

    opened = 0

    def open_wal_file(self, name: str) -> AbstractContextManager[WalFile]:
        self.opened += 1
        if self.opened == 2:
            path = self.path / "pg_wal" / name
            before = path.stat()
            with path.open("r+b") as file:
                file.seek(30 << 20)
                file.write(b"changed")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return super().open_wal_file(name)


class Lab:
    """A data directory with one segment, and what uploads it."""

    def __init__(self, store: ObjectStore, directory: DataDirectory, compression: Compression) -> None:
        self.archive = WalArchive(store, ObjectFormat(compression, None), digest_is_kept=True)
        self.budget = MemoryBudget(64 << 20)
        self.uploader = WalUploader(self.archive, directory, self.budget)
        self.file = directory.path / "pg_wal" / NAME
        self.file.parent.mkdir()


@pytest.fixture
async def store(s3_environment: dict[str, str]) -> AsyncIterator[ObjectStore]:
    opened = await open_store(load_settings(s3_environment), Metrics(CollectorRegistry()), SystemClock())
    yield opened
    await opened.close()


@pytest.mark.parametrize("compression", [Compression.ZSTD, Compression.LZ4])
async def test_a_large_segment_is_stored_in_parts_with_its_metadata_and_never_replaced(
    store: ObjectStore, tmp_path: Path, segment: bytes, compression: Compression
) -> None:
    lab = Lab(store, DataDirectory(tmp_path), compression)
    lab.file.write_bytes(segment)
    uploaded = await lab.uploader.upload(NAME, SYSTEM_IDENTIFIER)
    assert uploaded.stored.stored_bytes > SEGMENT_BYTES * 3 // 4
    assert await lab.archive.fetch(NAME, SYSTEM_IDENTIFIER) == segment
    times = await lab.archive.times(NAME)
    assert times == segment_times(segment)
    assert times is not None
    assert times.first != times.last
    assert (await lab.uploader.upload(NAME, SYSTEM_IDENTIFIER)).stored.already
    lab.file.write_bytes(segment[:-1] + b"x")
    with pytest.raises(WalConflict, match="other content"):
        await lab.uploader.upload(NAME, SYSTEM_IDENTIFIER)
    assert await lab.archive.fetch(NAME, SYSTEM_IDENTIFIER) == segment
    assert not lab.budget.used


async def test_a_large_segment_that_changes_between_its_two_readings_is_not_stored(
    store: ObjectStore, tmp_path: Path, segment: bytes
) -> None:
    lab = Lab(store, ChangingDirectory(tmp_path), Compression.LZ4)
    lab.file.write_bytes(segment)
    with pytest.raises(WalRefused, match="changed while it was read"):
        await lab.uploader.upload(NAME, SYSTEM_IDENTIFIER)
    assert [info async for info in store.list("")] == []
    assert not lab.budget.used
