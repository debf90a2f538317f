"""Fixture: a file system that is soon full."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_directory

MIB = 1 << 20


class SmallVolume:
    """A tmpfs on `path`, for whom PostgreSQL and the agent run as."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def mount(self, size: int) -> None:
        """Mount it with so many bytes; raise `subprocess.CalledProcessError` if that is not allowed."""
        make_directory(self.path)
        self._mount("-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs")

    def grow(self, size: int) -> None:
        """Make it as large as that."""
        self._mount("-o", f"remount,size={size}")

    def unmount(self) -> None:
        """Drop it and all that is on it."""
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def fill(self, *, leave: int) -> None:
        """Leave so many bytes free."""
        self._ballast.write_bytes(bytes(shutil.disk_usage(self.path).free - leave))

    def empty(self) -> None:
        """Take back what `fill` did."""
        self._ballast.unlink()

    def move_wal_here(self, cluster: PostgresCluster) -> None:
        """Let the server, which does not run, have its pg_wal on this volume."""
        pg_wal, here = cluster.data_directory / "pg_wal", self.path / "pg_wal"
        shutil.move(pg_wal, here)
        pg_wal.symlink_to(here)
        hand_over(here)
        hand_over(pg_wal)

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, self.path], check=True, capture_output=True)


@pytest.fixture
def small_volume(lab_directory: Path) -> Iterator[SmallVolume]:
    """A volume of 40 MiB; skips the test for whoever may not mount one."""
    volume = SmallVolume(lab_directory / "volume")
    try:
        volume.mount(40 * MIB)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system that fills up cannot be mounted here, which takes root: {error}")
    yield volume
    volume.unmount()
