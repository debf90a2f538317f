"""Where segments lie that are read ahead."""

import errno
from pathlib import Path

import pytest

from agent.fetch.spool import SPOOL_NAME, Spool
from tests.support.small_volume import SmallVolume
from tests.support.wal_writer import WalWriter

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
