"""Where segments lie that are read ahead."""

import asyncio
import errno
import os
from functools import partial
from itertools import pairwise
from operator import contains
from pathlib import Path

import pytest

from agent.budget import MemoryBudget
from agent.fetch.read_ahead import DOWNLOAD_MEMORY_BYTES, ReadAhead
from agent.fetch.spool import SPOOL_NAME, Spool
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.settings import Compression
from agent.storage.memory import MemoryObjectStore
from tests.support.small_volume import SmallVolume
from tests.support.until import until
from tests.support.wal_writer import SEGMENT_BYTES as SMALL_SEGMENT_BYTES
from tests.support.wal_writer import SYSTEM_IDENTIFIER, WalWriter

NAME = "000000010000000000000001"
SEGMENT_BYTES = 64 << 20
START_BYTES = 1 << 20


@pytest.fixture(scope="module")
def start() -> bytes:
    """The first bytes of a segment."""
    writer = WalWriter(SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
    writer.filler(7000)
    return writer.segments()[0][:START_BYTES]


def opened(data_directory: Path) -> Spool:
    (data_directory / "pg_wal").mkdir()
    spool = Spool(data_directory)
    assert spool.open()
    return spool


def test_what_an_earlier_run_left_is_never_given(tmp_path: Path, start: bytes) -> None:
    before = opened(tmp_path)
    whole = before.begin(NAME)
    whole.write(start)
    whole.complete()
    before.begin("000000010000000000000002").write(start)
    again = Spool(tmp_path)
    assert again.open()
    assert list(again.path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        again.give(NAME, tmp_path / "pg_wal" / "RECOVERYXLOG")


def test_two_agents_that_fetch_the_same_segment_do_not_cut_it(tmp_path: Path, start: bytes) -> None:
    one, other = opened(tmp_path), Spool(tmp_path)
    ours, others = one.begin(NAME), other.begin(NAME)
    ours.write(start)
    others.write(start)
    ours.write(b"x" * 100)
    ours.complete()
    one.give(NAME, tmp_path / "pg_wal" / "RECOVERYXLOG")
    assert (tmp_path / "pg_wal" / "RECOVERYXLOG").read_bytes()[: START_BYTES + 100] == start + b"x" * 100
    others.complete()


def test_there_is_no_spool_where_something_else_lies(tmp_path: Path) -> None:
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / NAME).touch()
    (tmp_path / "pg_wal" / SPOOL_NAME).symlink_to(tmp_path / "elsewhere")
    assert not Spool(tmp_path).open()
    assert (tmp_path / "elsewhere" / NAME).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_an_agent_of_another_user_leaves_nothing_that_postgresql_could_not_remove(tmp_path: Path) -> None:
    (tmp_path / "pg_wal").mkdir()
    os.chown(tmp_path / "pg_wal", 65534, 65534)
    assert not Spool(tmp_path).open()
    assert list((tmp_path / "pg_wal").iterdir()) == []


def test_a_segment_has_its_space_before_its_content_has_arrived(tmp_path: Path, start: bytes) -> None:
    file = opened(tmp_path).begin(NAME)
    file.write(start)
    file.close()
    (path,) = (tmp_path / "pg_wal" / SPOOL_NAME).iterdir()
    assert path.stat().st_size == SEGMENT_BYTES
    assert path.stat().st_blocks * 512 >= SEGMENT_BYTES
    with path.open("rb") as written:
        assert written.read(START_BYTES) == start


def test_a_volume_that_is_too_full_is_noticed_at_the_first_bytes(small_volume: SmallVolume, start: bytes) -> None:
    file = opened(small_volume.path).begin(NAME)
    with pytest.raises(OSError, match="No space left") as raised:
        file.write(start)
    file.close()
    assert raised.value.errno == errno.ENOSPC


def test_what_is_no_segment_takes_its_own_space(tmp_path: Path, start: bytes) -> None:
    file = opened(tmp_path).begin(NAME)
    for piece in (b"no header", start):
        file.write(piece)
    file.close()
    (path,) = (tmp_path / "pg_wal" / SPOOL_NAME).iterdir()
    assert path.read_bytes() == b"no header" + start


class WatchedSpool(Spool):
    """A spool that remembers what was flushed."""

    def __init__(self, data_directory: Path) -> None:
        super().__init__(data_directory)
        self.flushed: set[str] = set()

    def flush(self, name: str) -> None:
        super().flush(name)
        self.flushed.add(name)


async def test_what_lies_ready_is_flushed_before_recovery_asks_for_it(tmp_path: Path) -> None:
    writer = WalWriter(SMALL_SEGMENT_BYTES)
    while writer.lsn < 4 * SMALL_SEGMENT_BYTES:
        writer.filler(7000)
    store, names = MemoryObjectStore(), [f"00000001000000000000000{number}" for number in range(1, 4)]
    for name, content in zip(names, writer.segments(), strict=False):
        await store.put(f"wal_005/{name}", content)
    (tmp_path / "pg_wal").mkdir()
    spool = WatchedSpool(tmp_path)
    archive = WalArchive(store, ObjectFormat(Compression.NONE, None))
    ahead = ReadAhead(archive, spool, MemoryBudget(DOWNLOAD_MEMORY_BYTES), depth=1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ahead.run())
        await asyncio.sleep(0)
        assert await ahead.is_ready()
        for name, following in pairwise(names):
            obtained = await ahead.obtain(name, SYSTEM_IDENTIFIER)
            assert obtained is not None
            spool.give(name, tmp_path / name)
            ahead.go_on(name, obtained.size, SYSTEM_IDENTIFIER)
            await until(partial(contains, spool.flushed, following))
        running.cancel()


def test_a_segment_that_was_taken_away_needs_no_flush(tmp_path: Path) -> None:
    opened(tmp_path).flush(NAME)
