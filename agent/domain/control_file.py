"""`global/pg_control`: what a data directory says of itself.

Source: ControlFileData in PostgreSQL's src/include/catalog/pg_control.h, on 64-bit little-endian builds.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

_CHECKPOINT_OFFSET = 32
_NO_CHECKPOINT = 0xDEAD
_CRC_OFFSET_BY_VERSION = {1300: 288, 1700: 288, 1800: 292}
_MAJOR_BY_CATALOG = {
    202007201: 13, 202107181: 14, 202209061: 15, 202307071: 16, 202406281: 17, 202506291: 18
}  # fmt: skip


class ClusterState(IntEnum):
    """DBState."""

    STARTING_UP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The fields of pg_control that backup and restore need. Positions are LSNs."""

    system_identifier: int
    control_version: int
    catalog_version: int
    state: ClusterState
    checkpoint_lsn: int
    redo_lsn: int
    timeline: int
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    block_bytes: int
    relation_segment_blocks: int
    wal_segment_bytes: int
    data_checksums: bool

    @property
    def major_version(self) -> int | None:
        """PostgreSQL major version that made this data directory, or None if it is not one from 13 to 18."""
        return _MAJOR_BY_CATALOG.get(self.catalog_version)


def parse_control_file(content: bytes, crc32c: Callable[[bytes], int]) -> ControlFile:
    """Read the content of `global/pg_control`.

    Args:
        content: The whole file, or at least its first 300 bytes.
        crc32c: Castagnoli CRC of bytes.

    Raises:
        ValueError: It is short, of an unknown version, or its CRC does not match: it was read while being
            written, or it is damaged.
    """
    if len(content) < 300:
        raise ValueError(f"pg_control has only {len(content)} bytes")
    system_identifier, version, catalog = struct.unpack_from("<QII", content, 0)
    crc_offset = _CRC_OFFSET_BY_VERSION.get(version)
    if crc_offset is None:
        raise ValueError(f"pg_control has version {version}, which is of no PostgreSQL from 13 to 18")
    (crc,) = struct.unpack_from("<I", content, crc_offset)
    if crc32c(content[:crc_offset]) != crc:
        raise ValueError("pg_control has a wrong checksum")
    (state,) = struct.unpack_from("<i", content, 16)
    checkpoint, redo, timeline = struct.unpack_from("<QQI", content, _CHECKPOINT_OFFSET)
    connections, workers, senders, prepared, locks = struct.unpack_from("<5i", content, 180)
    block, relation_segment, _wal_block, wal_segment = struct.unpack_from("<4I", content, 216)
    (checksum_version,) = struct.unpack_from("<I", content, 252)
    return ControlFile(
        system_identifier=system_identifier,
        control_version=version,
        catalog_version=catalog,
        state=ClusterState(state),
        checkpoint_lsn=checkpoint,
        redo_lsn=redo,
        timeline=timeline,
        max_connections=connections,
        max_worker_processes=workers,
        max_wal_senders=senders,
        max_prepared_transactions=prepared,
        max_locks_per_transaction=locks,
        block_bytes=block,
        relation_segment_blocks=relation_segment,
        wal_segment_bytes=wal_segment,
        data_checksums=checksum_version != 0,
    )


def without_checkpoint(content: bytes, crc32c: Callable[[bytes], int]) -> bytes:
    """Return the pg_control `content` naming a checkpoint that cannot exist.

    A server then starts from its backup_label, or not at all. Without this, one whose label was removed (PostgreSQL's
    own hint proposes that) recovers from the checkpoint that happened to be last when the file was copied, and is
    damaged in silence.
    Source: pgBackRest's restore does the same, with the same number.
    """
    crc_offset = _CRC_OFFSET_BY_VERSION[parse_control_file(content, crc32c).control_version]
    changed = bytearray(content)
    struct.pack_into("<Q", changed, _CHECKPOINT_OFFSET, _NO_CHECKPOINT)
    struct.pack_into("<I", changed, crc_offset, crc32c(bytes(changed[:crc_offset])))
    return bytes(changed)
