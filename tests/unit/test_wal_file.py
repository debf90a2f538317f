"""What is opened in pg_wal: a WAL file itself, and nothing that somebody put in its place."""

import os
import stat
from pathlib import Path

import pytest

from agent.archive.uploader import WalUploader
from agent.budget import MemoryBudget
from agent.errors import AgentError
from agent.postgres.data_directory import DataDirectory
from agent.repository.wal_archive import WalArchive
from agent.storage.memory import MemoryObjectStore
from tests.support.object_formats import LZ4
from tests.support.wal_writer import SYSTEM_IDENTIFIER, WalWriter

NAME = "000000010000000000000001"


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "directory", "socket"])
async def test_what_is_no_file_is_not_archived(kind: str, tmp_path: Path) -> None:
    writer = WalWriter()
    writer.switch()
    (tmp_path / "elsewhere").write_bytes(writer.segments()[0])  # it would be archived if it were in its place
    place = tmp_path / "pg_wal" / NAME
    place.parent.mkdir()
    match kind:
        case "link" | "link to nothing":
            place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
        case "pipe":
            os.mkfifo(place)
        case "directory":
            place.mkdir()
        case "socket":
            os.mknod(place, stat.S_IFSOCK | 0o600)
    store = MemoryObjectStore()
    upload = WalUploader(WalArchive(store, LZ4), DataDirectory(tmp_path), MemoryBudget(64 << 20)).upload
    with pytest.raises(AgentError, match=rf'"{NAME}" (is not a regular file|cannot be read: )'):
        await upload(NAME, SYSTEM_IDENTIFIER)
    assert [info async for info in store.list("")] == []


async def test_the_file_itself_is_archived(tmp_path: Path) -> None:
    writer = WalWriter()
    writer.switch()
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "pg_wal" / NAME).write_bytes(writer.segments()[0])
    store = MemoryObjectStore()
    await WalUploader(WalArchive(store, LZ4), DataDirectory(tmp_path), MemoryBudget(64 << 20)).upload(
        NAME, SYSTEM_IDENTIFIER
    )
    assert len([info async for info in store.list("")]) == 1
