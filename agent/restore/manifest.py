"""PostgreSQL's backup manifest of the base backup that is restored: what proves each file, and the directory later.

Size and CRC32C of two million files take 56 MB.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backup_manifest import MANIFEST_FILE, parse_file_line, rewritten
from agent.repository.file_names import FileNames, digest_of
from agent.repository.keys import manifest_key
from agent.repository.object_format import ObjectFormat
from agent.repository.pieces import take_pieces
from agent.restore.wanted import MAP_FILE, is_stale
from agent.tasks import in_thread

_PIECE_BYTES = 1 << 20
_UNKNOWN = -1
# As nearly every line is, ours and PostgreSQL's: not parsed as JSON, two million of them take seconds less.
_USUAL_LINE = re.compile(
    rb'{ "Path": "([^"\\\x80-\xff]*)", "Size": ([0-9]{1,18}), "Last-Modified": "[^"\\]*", '
    rb'"Checksum-Algorithm": "CRC32C", "Checksum": "([0-9a-f]{8})" },?\n?'
)


class Manifest:
    """Size and CRC32C of every file of a base backup, and which of them have been seen to be right."""

    def __init__(self, key: str, lines: Iterable[bytes]) -> None:
        """Read the `lines` of the object `key`; raise `RepositoryCorrupt` if they are no manifest."""
        import numpy as np  # not for those who restore nothing

        self.key = key
        digests, sizes, checksums = array("Q"), array("q"), array("q")
        for line in lines:
            if line.startswith((b'{ "Path"', b'{ "Encoded-Path"')):
                name, size, checksum = self._entry(line)
                if not is_stale(name):
                    digests.append(digest_of(name))
                    sizes.append(size)
                    checksums.append(checksum)
        self._names = FileNames(digests)
        order = self._names.positions(digests)
        self._sizes, self._checksums = (np.zeros(len(self._names), np.int64) for _ in range(2))
        self._sizes[order], self._checksums[order] = sizes, checksums
        self._seen = bytearray(len(self._names))

    def _entry(self, line: bytes) -> tuple[str, int, int]:
        if usual := _USUAL_LINE.fullmatch(line):
            path, size, checksum_bytes = usual.groups()
            return path.decode("ascii"), int(size), int.from_bytes(bytes.fromhex(checksum_bytes.decode()), "little")
        try:
            entry = parse_file_line(line)
        except ValueError as error:
            raise RepositoryCorrupt(
                f"{self.key} is no backup manifest: {line[:100]!r}",
                hint="Bring back a copy of the object, or use another backup.",
            ) from error
        return entry.path, entry.size, _UNKNOWN if entry.crc32c is None else entry.crc32c

    def matches(self, name: str, size: int, checksum: int) -> bool:
        """Tell whether the file `name` is what was backed up; True also if the manifest does not tell."""
        return self.matches_digest(digest_of(name), size, checksum)

    def matches_digest(self, digest: int, size: int, checksum: int) -> bool:
        """As `matches`, of the file whose name has this digest."""
        position = self._names.position_of(digest)
        if position is None:
            return True
        is_right = int(self._sizes[position]) == size and int(self._checksums[position]) in (checksum, _UNKNOWN)
        self._seen[position] |= is_right
        return is_right

    def proves(self, name: str, size: int) -> bool:
        """Tell whether a file `name` of this size may be what was backed up, and a checksum is known to prove it by."""
        position = self._names.position(name)
        return (
            position is not None and int(self._sizes[position]) == size and int(self._checksums[position]) != _UNKNOWN
        )

    def add_seen(self, digests: Iterable[int]) -> None:
        """Take note of files that were seen to be right earlier."""
        for digest in digests:
            if (position := self._names.position_of(digest)) is not None:
                self._seen[position] = 1

    @property
    def unseen(self) -> int:
        """How many of its files nobody has seen."""
        return self._seen.count(0)


async def load_manifest(store: ObjectStore, objects: ObjectFormat, backup: str, spool: Path) -> Manifest | None:
    """Return the manifest of `backup`, kept in the file `spool`; None if the repository has none, as WAL-G makes none.

    Raises:
        RepositoryError: It cannot be read, or is damaged.
        OSError: The volume failed, or is full.
    """
    key = manifest_key(backup)
    with await in_thread(_created, spool) as file:
        decoder = objects.decoder(key, file.write)
        if not await take_pieces(store, key, decoder.take):
            return None
        await in_thread(decoder.finish)

    def read() -> Manifest:
        with spool.open("rb") as lines:
            return Manifest(key, lines)

    return await in_thread(read)


def _created(path: Path) -> BinaryIO:
    return path.open("wb")


def place_manifest(spool: Path, data_directory: Path) -> None:
    """Write the manifest kept in `spool` into `data_directory`, durably but for its name. Raises `OSError`.

    The entry of tablespace_map is made to fit the one that is there: tablespaces may have been given other places.
    """
    with spool.open("rb") as lines, (data_directory / MANIFEST_FILE).open("wb") as manifest:
        manifest.writelines(rewritten(lines, dict(_changed(data_directory))))
        manifest.flush()
        os.fsync(manifest.fileno())


def _changed(data_directory: Path) -> Iterator[tuple[str, bytes]]:
    if (data_directory / MAP_FILE).exists():
        yield MAP_FILE, (data_directory / MAP_FILE).read_bytes()


def checksum_of(path: Path) -> tuple[int, int]:
    """Return size and CRC32C of the file at `path`. Raises `OSError`."""
    size, checksum = 0, 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            checksum = google_crc32c.extend(checksum, piece)
    return size, checksum
