"""What a base backup says of its files, while it grows."""

import tempfile
from contextlib import closing

import pytest

from agent.backup.record import BackupRecord
from agent.domain.backup_file import PackedFile
from agent.errors import BackupFailed
from tests.support.small_volume import SmallVolume


def list_many_files() -> None:
    with closing(BackupRecord()) as record:
        for part in range(10):
            numbers = range(16384 * part, 16384 * (part + 1))
            record.add_tar(f"part_{part:03d}.tar", [PackedFile(f"/base/5/{number}", 0, crc32c=1) for number in numbers])


def test_no_room_for_the_list_of_files_is_told(small_volume: SmallVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path))
    small_volume.fill(leave=12 << 20)
    with pytest.raises(BackupFailed, match=rf"in {small_volume.path}: No space"):
        list_many_files()
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path / "nowhere"))
    with pytest.raises(BackupFailed, match="nowhere: No such"):
        list_many_files()
