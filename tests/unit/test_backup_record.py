"""What a base backup says of its files, while it grows."""

import tempfile
from collections.abc import Iterator
from contextlib import closing

import pytest

from agent.backup.record import BackupRecord
from agent.domain.backup_file import PackedFile
from agent.errors import BackupFailed
from tests.support.small_volume import SmallVolume


def some_files(first: int) -> Iterator[PackedFile]:
    return (PackedFile(f"/base/16384/{number}", 0, crc32c=1) for number in range(first, first + 16384))


def test_no_room_for_the_list_of_files_is_told(small_volume: SmallVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path))
    small_volume.fill(leave=12 << 20)
    with pytest.raises(BackupFailed, match=rf"in {small_volume.path}: No space"), closing(BackupRecord()) as record:
        for number in range(10):
            record.add_tar(f"part_{number:03d}.tar", some_files(16384 * number))
    small_volume.empty()
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path / "nowhere"))
    with pytest.raises(BackupFailed, match="nowhere"), closing(BackupRecord()) as record:
        for number in range(10):
            record.add_tar(f"part_{number:03d}.tar", some_files(16384 * number))
