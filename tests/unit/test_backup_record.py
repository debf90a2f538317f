"""What a base backup says of its files, while it grows."""

import tempfile
from collections.abc import Callable
from contextlib import closing

import pytest

from agent.backup.record import BackupRecord
from agent.domain.backup_file import PackedFile
from agent.errors import BackupFailed
from agent.ports import BackupStop
from tests.support.small_volume import SmallVolume


def list_files(record: BackupRecord, parts: int, *, count: int = 16384) -> None:
    for part in range(parts):
        numbers = range(count * part, count * (part + 1))
        record.add_tar(f"part_{part:03d}.tar", [PackedFile(f"/base/5/{number}", 0, crc32c=1) for number in numbers])


def when_all_is_full(volume: SmallVolume, do: Callable[[BackupRecord], None]) -> None:
    """Let there be no room for the temporary files, and do it often enough: what is added is not written at once."""
    with closing(BackupRecord()) as record:
        list_files(record, 7)
        volume.fill(leave=0)
        for _ in range(1000):
            do(record)


@pytest.fixture(autouse=True)
def temporary_files(small_volume: SmallVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path))


@pytest.mark.parametrize(
    "add",
    [
        lambda record: list_files(record, 10),
        lambda record: record.add_control_file(b""),
        lambda record: record.add_label_tar("backup_label.tar", BackupStop(1, b"label", b"")),
    ],
    ids=["tar", "control file", "label"],
)
def test_no_room_for_the_list_of_files_is_told(small_volume: SmallVolume, add: Callable[[BackupRecord], None]) -> None:
    with pytest.raises(BackupFailed, match=rf"in {small_volume.path}: No space"):
        when_all_is_full(small_volume, add)


def test_no_place_for_the_list_of_files_is_told(small_volume: SmallVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_volume.path / "nowhere"))
    with pytest.raises(BackupFailed, match="nowhere: No such"), closing(BackupRecord()) as record:
        list_files(record, 10)


def test_no_room_for_a_list_that_is_given_up_hides_no_reason(small_volume: SmallVolume) -> None:
    def give_up(record: BackupRecord) -> None:
        list_files(record, 1, count=10)
        raise BackupFailed("for another reason")

    with pytest.raises(BackupFailed, match="for another reason"):
        when_all_is_full(small_volume, give_up)
