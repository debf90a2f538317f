"""Packs WAL files for the repository, piece by piece: digest, metadata and packed bytes of a content read once.

Blocks: call it in threads. Memory: the packed bytes, twice for a moment, and a piece.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from agent.domain.wal import WalFileKind, wal_file_kind
from agent.domain.wal_times import segment_times_of
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_metadata import wal_metadata


class WalSource(Protocol):
    """A WAL file to be packed."""

    @property
    def name(self) -> str:
        """Its PostgreSQL name."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    def part(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, fewer at the end of the file."""

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content, each piece to be used before the next; raise if it changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A WAL file made ready to be stored: digest (hex), size, packed bytes and metadata of one content."""

    name: str
    content_bytes: int
    digest: str
    body: bytes
    metadata: Mapping[str, str]


class WalPacker:
    """Packs WAL files in the format of one repository."""

    def __init__(self, objects: ObjectFormat, *, digest_is_kept: bool) -> None:
        """`digest_is_kept`: the store keeps metadata, so that the packed bytes need no checksum of their own."""
        self._objects = objects
        self._checksum = not digest_is_kept

    def pack(self, source: WalSource, system_identifier: int | None) -> Packed:
        """Read and pack a whole file, of `system_identifier` if it tells that; raises what `source` raises."""
        hasher, encoder = self._objects.hasher(), self._objects.encoder(checksum=self._checksum)
        packed = []
        for piece in source.pieces():
            hasher.update(piece)
            packed.append(encoder.encode(piece))
        packed.append(encoder.flush())
        digest = hasher.hexdigest()
        return Packed(
            source.name, source.size, digest, b"".join(packed), self._metadata(source, digest, system_identifier)
        )

    def _metadata(self, source: WalSource, digest: str, system_identifier: int | None) -> dict[str, str]:
        is_segment = wal_file_kind(source.name) is WalFileKind.SEGMENT
        times = segment_times_of(source.size, source.part) if is_segment else None
        return wal_metadata(digest, source.size, system_identifier, times)
