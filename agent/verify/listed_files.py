"""What a base backup says of its files: `files_metadata.json` and, in ours, PostgreSQL's backup manifest.

Both are read as they arrive. A file takes 22 bytes of memory, so that two million take 44 MB.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backup_manifest import ManifestEntry, ManifestReader
from agent.repository.backups import Sentinel
from agent.repository.file_names import FileNames, digest_of
from agent.repository.keys import files_metadata_key, manifest_key
from agent.repository.object_format import ObjectFormat
from agent.repository.parent_files import FilesReader
from agent.repository.pieces import take_pieces
from agent.repository.tar_reader import path_below
from agent.tasks import in_thread

# In tars that no list names: these are known from elsewhere.
_UTILITY_FILES = ("global/pg_control", "backup_label", "tablespace_map")
_INCREMENTED, _SKIPPED, _UTILITY, _CORRUPT, _SIZED, _SUMMED, _ARRIVED = (1 << bit for bit in range(7))


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What is said of one file. `size` and `crc32c` are those of the file as a restore makes it; None: not said.

    was_corrupt: pages with wrong checksums were found in it when the backup was taken.
    """

    position: int
    is_incremented: bool
    was_corrupt: bool
    size: int | None
    crc32c: int | None


class ListedFiles:
    """The files that a base backup should hold, and which of them have been found."""

    def __init__(self) -> None:
        self.is_complete = False
        """Whether there is a list of all files; without one nothing is known to be missing."""
        self._digests = array("Q")
        self._flags = bytearray()
        self._names = FileNames(self._digests)
        self._sizes = array("Q")
        self._checksums = array("I")

    def add(self, path: str, description: Any) -> None:
        """Add a file as `files_metadata.json` describes it; to be sealed, once all are added."""
        if path not in _UTILITY_FILES:
            flags = _INCREMENTED if description.get("IsIncremented") else 0
            flags |= _SKIPPED if description.get("IsSkipped") else 0
            self._append(path, flags | (_CORRUPT if description.get("CorruptBlocks") else 0))

    def _append(self, path: str, flags: int) -> None:
        self._digests.append(digest_of(path))
        self._flags.append(flags)

    def seal(self) -> None:
        """End adding. Blocks: call it in a thread."""
        import numpy as np  # not for those who read nothing

        for path in _UTILITY_FILES:
            self._append(path, _UTILITY)
        self._names = FileNames(self._digests)
        flags = np.zeros(len(self._names), np.uint8)
        flags[self._names.positions(self._digests)] = np.frombuffer(self._flags, np.uint8)
        self._digests, self._flags = array("Q"), bytearray(flags.tobytes())
        self._sizes = array("Q", bytes(8 * len(flags)))
        self._checksums = array("I", bytes(4 * len(flags)))

    def describe(self, entry: ManifestEntry) -> bool:
        """Take what the backup manifest says of a file; return whether the file is listed."""
        position = self._names.position(entry.path)
        if position is None:
            return False
        self._sizes[position] = entry.size
        self._checksums[position] = entry.crc32c or 0
        self._flags[position] |= _SIZED | (0 if entry.crc32c is None else _SUMMED)
        return True

    def find(self, path: str) -> ListedFile | None:
        """Return what is said of the file `path`, None if it is not listed."""
        position = self._names.position(path)
        if position is None:
            return None
        flags = self._flags[position]
        return ListedFile(
            position,
            bool(flags & _INCREMENTED),
            bool(flags & _CORRUPT),
            self._sizes[position] if flags & _SIZED else None,
            self._checksums[position] if flags & _SUMMED else None,
        )

    def arrive(self, positions: Iterable[int]) -> int:
        """Note that these files were found; return how many of them had been found before.

        `pg_control` may come twice: some backups have it in a part, too.
        """
        again = 0
        for position in positions:
            again += self._flags[position] & (_ARRIVED | _UTILITY) == _ARRIVED
            self._flags[position] |= _ARRIVED
        return again

    @property
    def arrived(self) -> int:
        """How many of the files that the tars should hold were found."""
        return sum(flags & (_ARRIVED | _SKIPPED | _UTILITY) == _ARRIVED for flags in self._flags)

    @property
    def expected(self) -> int:
        """How many files and directories the tars should hold."""
        return sum(not flags & (_SKIPPED | _UTILITY) for flags in self._flags)

    def is_missing(self, path: str) -> bool:
        """Tell whether the tars should hold the file, and it was not found."""
        position = self._names.position(path)
        return position is not None and not self._flags[position] & (_ARRIVED | _SKIPPED | _UTILITY)


async def read_listed_files(
    store: ObjectStore, objects: ObjectFormat, sentinel: Sentinel, problems: list[str]
) -> ListedFiles:
    """Return what is said of the files; add to `problems` what is wrong with the objects that say it.

    Raises:
        RepositoryError: One could not be read.
    """
    listed = ListedFiles()
    try:
        listed.is_complete = await _take_files(store, sentinel, listed.add)
    except RepositoryCorrupt as error:
        problems.append(error.message)
    await in_thread(listed.seal)
    try:
        await _take_manifest(store, objects, sentinel.name, listed, problems)
    except RepositoryCorrupt as error:
        problems.append(error.message)
    return listed


async def first_missing(store: ObjectStore, sentinel: Sentinel, listed: ListedFiles) -> str | None:
    """Name the first listed file that was not found, None if there is none. Reads the list again."""
    found: list[str] = []

    def look(path: str, _description: Any) -> None:
        if not found and listed.is_missing(path):
            found.append(path)

    await _take_files(store, sentinel, look)
    return found[0] if found else None


async def _take_files(store: ObjectStore, sentinel: Sentinel, add: Callable[[str, Any], None]) -> bool:
    """Hand every listed file to `add`; return whether there is a list."""
    if sentinel.embedded_files is not None:
        for name, file in sentinel.embedded_files.files.items():
            add(path_below(name, sentinel.name), {"IsIncremented": file.is_incremented, "IsSkipped": file.is_skipped})
        return bool(sentinel.embedded_files.files)
    if sentinel.files_metadata_disabled:
        return False
    key = files_metadata_key(sentinel.name)
    reader, has_files = FilesReader(key), False

    def take(piece: bytes) -> None:
        nonlocal has_files
        for name, description in reader.take(piece):
            has_files = True
            if not isinstance(description, dict):
                raise RepositoryCorrupt(f"{key}: its description of {name[:200]} cannot be understood")
            add(path_below(name, key), description)

    if not await take_pieces(store, key, take):
        return False
    reader.finish()
    return has_files


async def _take_manifest(
    store: ObjectStore, objects: ObjectFormat, backup: str, listed: ListedFiles, problems: list[str]
) -> None:
    key = manifest_key(backup)
    reader, unlisted = ManifestReader(key), list[str]()

    def take(plain: bytes) -> None:
        unlisted.extend(entry.path for entry in reader.take(plain) if not listed.describe(entry))
        del unlisted[1:]

    decoder = objects.decoder(key, take)
    if not await take_pieces(store, key, decoder.take):  # WAL-G makes none
        return
    await in_thread(decoder.finish)
    reader.finish()
    if unlisted and listed.is_complete:
        problems.append(f"{key} tells of {unlisted[0]}, which {files_metadata_key(backup)} does not list")
