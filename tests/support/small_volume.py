"""Fixtures: a file system that is soon full, and one that promises more than what it lies on can hold."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
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

    def allow(self, files: int) -> None:
        """Let it have so many files and directories."""
        self._mount("-o", f"remount,nr_inodes={files}")

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


@dataclass(frozen=True)
class ThinVolume:
    """An ext4 on `path`, whose blocks are given out as they are written: by `pool`, which is soon full."""

    path: Path
    pool: SmallVolume


@pytest.fixture
def thin_volume(small_volume: SmallVolume, lab_directory: Path) -> Iterator[ThinVolume]:
    """A volume of 64 MiB on a pool of 8 MiB: what is written beyond that fails when the kernel writes it back."""
    small_volume.grow(8 * MIB)
    image, path = small_volume.path / "image", lab_directory / "thin"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    path.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"an ext4 in a file cannot be mounted here: {error}")
    yield ThinVolume(path, small_volume)
    subprocess.run(["umount", "--lazy", path], check=True)
