"""What an upload takes of the memory budget, it holds until it is through with the memory."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.archive.uploader import WalUploader
from agent.budget import MemoryBudget
from agent.errors import RepositoryRefused
from agent.ports import ObjectInfo
from agent.postgres.data_directory import DataDirectory
from agent.postgres.wal_file import WalFile
from agent.repository.wal_archive import WalArchive
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import LZ4
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter

NAME = "000000010000000000000001"


class RefusingStore(MemoryObjectStore):
    """Its credentials may not list."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = asyncio.Event()

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        async for info in super().list(prefix, after=after):
            yield info
        self.refused.set()
        raise RepositoryRefused("may not list")


class SlowDisk(DataDirectory):
    """Reading begins, and goes on when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.began, self.go_on = threading.Event(), threading.Event()

    @contextmanager
    def open_wal_file(self, name: str) -> Iterator[WalFile]:
        self.began.set()
        assert self.go_on.wait(30)
        with super().open_wal_file(name) as file:
            yield file


async def test_a_refused_upload_keeps_its_memory_reserved_while_its_thread_packs(tmp_path: Path) -> None:
    writer = WalWriter()
    writer.switch()
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "pg_wal" / NAME).write_bytes(writer.segments()[0])
    store, disk, budget = RefusingStore(), SlowDisk(tmp_path), MemoryBudget(64 << 20)
    upload = asyncio.create_task(WalUploader(WalArchive(store, LZ4), disk, budget).upload(NAME, SYSTEM_IDENTIFIER))
    assert await asyncio.to_thread(disk.began.wait, 30)
    await store.refused.wait()
    for _ in range(10):  # turns of the loop, in which the refusal gets where it can
        await asyncio.sleep(0)
    assert budget.used == 2 * SEGMENT_BYTES
    disk.go_on.set()
    with pytest.raises(RepositoryRefused):
        await upload
    assert budget.used == 0
