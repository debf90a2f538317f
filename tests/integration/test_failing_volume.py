"""A volume that fails to write what it has accepted."""

import ctypes
import os
import random
from pathlib import Path

import pytest

from agent.restore.hydrate import claim, hydrate
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.progress import Progress
from tests.support.object_formats import LZ4
from tests.support.small_volume import MIB, ThinVolume
from tests.support.walg_backup import BackupContent, plan_of


def sync_volume(path: Path) -> bool:
    """Have everything on a volume written, as `sync -f` does; tell whether that went well."""
    directory = os.open(path, os.O_RDONLY)
    try:
        failed: int = ctypes.CDLL(None).syncfs(directory)
        return not failed
    finally:
        os.close(directory)


async def test_a_failure_that_another_process_was_told_of_is_not_missed(thin_volume: ThinVolume) -> None:
    # The kernel tells of it once, and whoever opens the volume afterwards never hears of it. By then there is room
    # again: nothing but the lost write is wrong.
    content = BackupContent(parts=[{"/base/1/16384": random.Random(1).randbytes(16 * MIB)}])
    store = MemoryObjectStore()
    await content.put(store)
    data_directory = thin_volume.path / "data"
    await claim(data_directory)
    others: list[bool] = []

    def another_syncs(_: Progress) -> None:
        if not all(others):
            return
        others.append(sync_volume(thin_volume.path))
        if not all(others):
            thin_volume.pool.grow(80 * MIB)

    with pytest.raises(OSError, match=r"No space left on device|Input/output error"):
        await hydrate(
            store,
            LZ4,
            plan_of(content),
            data_directory,
            tablespace_map={},
            concurrency=1,
            report=another_syncs,
        )
    assert others[-1] is False
