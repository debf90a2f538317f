"""pg_control: read only if whole; without its checkpoint a server needs the label."""

import struct

import google_crc32c
import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers, sampled_from

from agent.domain.control_file import ClusterState, parse_control_file, without_checkpoint

CONTROL_FILE_BYTES = 8192  # PG_CONTROL_FILE_SIZE
CRC_OFFSETS = {1300: 288, 1700: 288, 1800: 292}
crc32c = google_crc32c.value


def control_file(version: int, filling: bytes = b"") -> bytes:
    """A pg_control of `version` with `filling` where nothing is read, and a right checksum."""
    content = bytearray(filling.ljust(CONTROL_FILE_BYTES, b"\0")[:CONTROL_FILE_BYTES])
    struct.pack_into("<QIIi", content, 0, 7_000_000_000_000_000_001, version, 202209061, ClusterState.IN_PRODUCTION)
    struct.pack_into("<QQI", content, 32, 0x900060, 0x900028, 3)
    crc_offset = CRC_OFFSETS[version]
    struct.pack_into("<I", content, crc_offset, crc32c(bytes(content[:crc_offset])))
    return bytes(content)


@pytest.mark.parametrize("version", CRC_OFFSETS)
def test_a_control_file_is_read(version: int) -> None:
    control = parse_control_file(control_file(version), crc32c)
    assert control.system_identifier == 7_000_000_000_000_000_001
    assert control.state is ClusterState.IN_PRODUCTION
    assert (control.checkpoint_lsn, control.redo_lsn, control.timeline) == (0x900060, 0x900028, 3)
    assert control.major_version == 15


@given(sampled_from(sorted(CRC_OFFSETS)), integers(0, 287), integers(0, 7))
def test_one_flipped_bit_is_found(version: int, byte: int, bit: int) -> None:
    damaged = bytearray(control_file(version))
    damaged[byte] ^= 1 << bit
    with pytest.raises(ValueError, match="pg_control has"):
        parse_control_file(bytes(damaged), crc32c)


@given(sampled_from(sorted(CRC_OFFSETS)), binary(max_size=CONTROL_FILE_BYTES))
def test_without_its_checkpoint_nothing_else_differs(version: int, filling: bytes) -> None:
    before = control_file(version, filling)
    after = without_checkpoint(before, crc32c)
    assert parse_control_file(after, crc32c).checkpoint_lsn == 0xDEAD
    checkpoint, checksum = range(32, 40), range(CRC_OFFSETS[version], CRC_OFFSETS[version] + 4)
    differs = {index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    assert differs <= {*checkpoint, *checksum}
    assert without_checkpoint(after, crc32c) == after


def test_a_damaged_control_file_is_not_made_valid() -> None:
    damaged = control_file(1300)[:-1].replace(b"\x03\x00\x00\x00", b"\x04\x00\x00\x00", 1)
    with pytest.raises(ValueError, match="wrong checksum"):
        without_checkpoint(damaged, crc32c)
