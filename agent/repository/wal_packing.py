"""Packs WAL files for the repository, piece by piece: a small one as a whole, a large one as a stream.

A small file is read once. Of a large one the metadata must be known before its first byte is sent, so it is read twice,
and the second reading has to find what the first has found.

Blocks: call it in threads.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from agent.domain.wal import WalFileKind, wal_file_kind
from agent.domain.wal_times import segment_times_of
from agent.errors import WalRefused
from agent.repository.object_format import Encoder, ObjectFormat
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


WHOLE_BYTES = 32 << 20
"""The largest WAL file that is packed as a whole, which takes twice the packed bytes of memory for a moment."""

_CHUNK_BYTES = 1 << 20  # packed bytes that a stream hands on at once
_READ_AT_ONCE_BYTES = 16 << 20  # most that is read for it


@dataclass(frozen=True, slots=True)
class Description:
    """One content of a WAL file: its size in bytes, digest (hex), and the metadata to be stored with it."""

    name: str
    content_bytes: int
    digest: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Packed:
    """A WAL file made ready to be stored as a whole."""

    description: Description
    body: bytes


class WalPacker:
    """Packs WAL files in the format of one repository."""

    def __init__(self, objects: ObjectFormat, *, digest_is_kept: bool) -> None:
        """`digest_is_kept`: the store keeps metadata, so that a packed segment needs no checksum of its own.

        Should the metadata be lost, a segment's records still prove it. Nothing does that of a history file.
        """
        self._objects = objects
        self._digest_is_kept = digest_is_kept

    def pack(self, source: WalSource, system_identifier: int | None) -> Packed:
        """Read and pack a whole file, of `system_identifier` if it tells that; raises what `source` raises."""
        hasher, encoder = self._objects.hasher(), self._encoder(source)
        packed = []
        for piece in source.pieces():
            hasher.update(piece)
            packed.append(encoder.encode(piece))
        packed.append(encoder.flush())
        return Packed(self._described(source, hasher.hexdigest(), system_identifier), b"".join(packed))

    def describe(self, source: WalSource, system_identifier: int | None) -> Description:
        """Read a whole file and tell what `stream` will pack; raises what `source` raises."""
        hasher = self._objects.hasher()
        for piece in source.pieces():
            hasher.update(piece)
        return self._described(source, hasher.hexdigest(), system_identifier)

    def stream(self, source: WalSource, description: Description) -> Generator[bytes, None, None]:
        """Read and pack the file again; yield the packed bytes, about 1 MiB at a time.

        Raises:
            WalRefused: It is not what was described; nothing of it is to be stored.
        """
        hasher, encoder = self._objects.hasher(), self._encoder(source)
        packed, size, taken = [], 0, 0
        for piece in source.pieces():
            hasher.update(piece)
            packed.append(encoder.encode(piece))
            size, taken = size + len(packed[-1]), taken + len(piece)
            if size >= _CHUNK_BYTES or taken >= _READ_AT_ONCE_BYTES:
                yield b"".join(packed)
                packed, size, taken = [], 0, 0
        if hasher.hexdigest() != description.digest:
            raise WalRefused(f'WAL file "{source.name}" changed while it was read')
        packed.append(encoder.flush())
        yield b"".join(packed)

    def _encoder(self, source: WalSource) -> Encoder:
        is_proven = self._digest_is_kept and wal_file_kind(source.name) in (WalFileKind.SEGMENT, WalFileKind.PARTIAL)
        # A frame's checksum tells nothing of the others: where it is all there is, one of all the content is needed.
        return self._objects.encoder(checksum=not is_proven, apart=is_proven)

    def _described(self, source: WalSource, digest: str, system_identifier: int | None) -> Description:
        is_segment = wal_file_kind(source.name) is WalFileKind.SEGMENT
        times = segment_times_of(source.size, source.part) if is_segment else None
        metadata = wal_metadata(digest, source.size, system_identifier, times)
        return Description(source.name, source.size, digest, metadata)
