"""Writes the members of base backups' tars into a data directory.

Left out, whatever a backup holds: what would act again on a restored server (signal files, a postmaster.pid, labels of
other backups, replication slots), links, and the agent's own files.

The base backups of a chain come newest first, so that no page is written twice. Each file is checked by the manifest
while it is written, if there is one; one that is put together from several backups, when it is complete.

Everything here blocks for file I/O and is called in threads, for several tars at once.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import structlog

from agent.errors import RepositoryCorrupt
from agent.postgres.durable import Durability
from agent.repository.file_names import digest_of
from agent.repository.increments import IncrementApplier, write_at
from agent.repository.tar_reader import Member, MemberKind, path_below
from agent.restore.manifest import Manifest, checksum_of
from agent.restore.parts_done import Increment, PartRecord
from agent.restore.wanted import (
    CONTROL_FILE,
    LABEL_FILE,
    MAP_FILE,
    UTILITY_FILES,
    FilesOfBackup,
    Take,
    WantedFiles,
    is_stale,
)
from agent.restore.written_pages import WrittenPages

if TYPE_CHECKING:
    from numpy import bool_
    from numpy.typing import NDArray

UNFINISHED_CONTROL_FILE = f"{CONTROL_FILE}.pitr-new"
"""Where pg_control is kept until everything else is in place."""

_TAKES = tuple(Take)

log = structlog.get_logger()


class Building:
    """A data directory that is being put together from the files `wanted`.

    kept: positions of files that are there already and right. built: pages in place of the files that come from more
    than one base backup.
    """

    def __init__(self, data_directory: Path, wanted: WantedFiles, manifest: Manifest | None) -> None:
        self.data_directory = data_directory
        self._root = str(data_directory)
        self.wanted = wanted
        self.manifest = manifest
        self.kept = bytearray(0 if wanted.names is None else len(wanted.names))
        self.built: dict[str, WrittenPages] = {}

    def keep(self, name: str) -> None:
        """Take note that the file or directory `name` is there already and right."""
        names = self.wanted.names
        if names is not None and (position := names.position(name)) is not None:
            self.kept[position] = 1

    def path(self, name: str) -> str:
        """Return where the file `name` is, or will be until the end."""
        return f"{self._root}/{UNFINISHED_CONTROL_FILE if name == CONTROL_FILE else name}"

    def check_built(self, names: Iterable[str]) -> None:
        """Return if the files `names`, which came from more than one backup, are what was backed up."""
        for name in names:
            if self.manifest is not None and not self.manifest.matches(name, *checksum_of(Path(self.path(name)))):
                raise RepositoryCorrupt(
                    f"{name}, put together from the base backups up to {self.wanted.sources[-1].backup}, is not as "
                    f"long as {self.manifest.key} says, or has another CRC32C",
                    hint="An object of this chain was damaged: use another backup.",
                )


class Unpacking:
    """One base backup of the chain being unpacked: what has arrived of it."""

    def __init__(self, building: Building, source: FilesOfBackup) -> None:
        self.building = building
        self.backup = source.backup
        self.is_target = source is building.wanted.sources[-1]
        self._takes = source.takes
        self._arrived = bytearray(len(source.takes))
        self._others: set[int] = set()
        self._lock = threading.Lock()

    def take(self, name: str, digest: int) -> Take:
        """Return how the file or directory `name`, with this digest, is to be taken."""
        names = self.building.wanted.names
        if names is None:
            return Take.WHOLE
        position = names.position_of(digest)
        if position is None or self.building.kept[position]:
            return Take.NOT
        pages = self.building.built.get(name)
        return Take.NOT if pages is not None and pages.are_all else _TAKES[self._takes[position]]

    def arrive(self, digest: int) -> bool:
        """Take note that what has a name with this digest is in a tar; tell whether it is the first time."""
        names = self.building.wanted.names
        position = None if names is None else names.position_of(digest)
        with self._lock:
            if position is None:
                is_first = digest not in self._others
                self._others.add(digest)
            else:
                is_first = not self._arrived[position]
                self._arrived[position] = 1
        return is_first

    def repeat(self, record: PartRecord) -> None:
        """Take note of what an earlier run has unpacked, durably."""
        names, building = self.building.wanted.names, self.building
        for digest in record.arrived:
            if names is not None and (position := names.position_of(digest)) is not None:
                self._arrived[position] = 1
        if building.manifest is not None:
            building.manifest.add_seen(record.arrived)
        for increment in record.increments:
            pages = building.built.setdefault(increment.name, WrittenPages(increment.file_bytes))
            for block in increment.blocks:
                pages.add(block)
            pages.cut(increment.file_bytes)

    def needed(self) -> "NDArray[bool_]":
        """Return of each position whether it has to come from this base backup still."""
        import numpy as np  # not for those who restore nothing

        building = self.building
        needed: NDArray[bool_] = (np.frombuffer(self._takes, np.uint8) != Take.NOT) & (
            np.frombuffer(building.kept, np.uint8) == 0
        )
        if building.wanted.names is not None:
            for name, pages in building.built.items():
                if pages.are_all and (position := building.wanted.names.position(name)) is not None:
                    needed[position] = False
        return needed

    def missing(self) -> list[int]:
        """Return the positions of what is wanted of this backup and has not arrived."""
        import numpy as np

        positions: list[int] = np.flatnonzero(self.needed() & (np.frombuffer(self._arrived, np.uint8) == 0)).tolist()
        return positions


class Unpacker:
    """A `MemberSink` that writes the members of the tar stored as `key`; `record` tells what came out of it."""

    def __init__(self, unpacking: Unpacking, key: str) -> None:
        self.record = PartRecord()
        self._unpacking = unpacking
        self._building = unpacking.building
        self._key = key
        self._file: _File | None = None
        self._written = Durability()

    def begin(self, member: Member) -> None:
        """As `MemberSink`."""
        name = path_below(member.name, self._key)
        digest = digest_of(name)
        take = self._take(member, name, digest)
        if take is Take.NOT:
            return
        if not self._unpacking.arrive(digest) and name != CONTROL_FILE and member.kind is MemberKind.FILE:
            # pg_control alone may come twice: some backups have it in a part besides its own tar.
            raise RepositoryCorrupt(
                f"base backup {self._unpacking.backup} holds {name} twice; the second is in {self._key}",
                hint="An object was added to its tar_partitions: remove what does not belong there.",
            )
        self.record.arrived.append(digest)
        if member.kind is MemberKind.DIRECTORY:
            path = Path(self._building.path(name))
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if name:
                path.chmod(member.mode & 0o777 | 0o700)
            self._written.add_directory(path.parent)
            return
        self._file = self._begin_file(member, name, digest, take)
        self._written.begin(self._file.path)

    def write(self, data: memoryview) -> None:
        """As `MemberSink`."""
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                error.filename = error.filename or self._file.path
                raise

    def end(self) -> None:
        """As `MemberSink`."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if (increment := file.end()) is not None:
                self.record.increments.append(increment)
            self._written.add(file.path, file.descriptor)
        finally:
            os.close(file.descriptor)

    def close(self) -> None:
        """Close what is open: the file being written, if there is one, and the volumes."""
        if self._file is not None:
            os.close(self._file.descriptor)
            self._file = None
        self._written.close()

    def sync(self) -> None:
        """Return when all that was written is durable, with the names of the files."""
        self._written.sync()

    def _take(self, member: Member, name: str, digest: int) -> Take:
        unpacking = self._unpacking
        if member.kind is MemberKind.OTHER:
            log.warning("link or device in a base backup left out", key=self._key, name=member.name)
            return Take.NOT
        if name in UTILITY_FILES:
            # With a slash it is what lay in the data directory: of another backup.
            is_stale_label = name in (LABEL_FILE, MAP_FILE) and member.name.startswith("/")
            return Take.WHOLE if unpacking.is_target and not is_stale_label else Take.NOT
        if is_stale(name):
            return Take.NOT
        if member.kind is MemberKind.DIRECTORY and unpacking.is_target:
            return Take.WHOLE
        return unpacking.take(name, digest)

    def _begin_file(self, member: Member, name: str, digest: int, take: Take) -> "_File":
        path = self._building.path(name)
        pages, mode = self._building.built.get(name), member.mode & 0o777 | 0o600
        flags = os.O_WRONLY if pages is not None else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = _open(path, flags, mode)
        if take is Take.INCREMENT:
            return _IncrementedFile(descriptor, path, name, member.size, self._key, self._building)
        if pages is not None:
            return _OldestFile(descriptor, path, member.size, pages)
        return _WholeFile(descriptor, path, name, digest, member.size, self._key, self._building.manifest)


def _open(path: str, flags: int, mode: int) -> int:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o600)
    if flags & os.O_CREAT and mode != 0o600:
        os.fchmod(descriptor, mode)
    return descriptor


def _as_bytes(data: memoryview) -> bytes:
    """Return the bytes of `data`, not copied if they are a whole object."""
    return data.obj if isinstance(data.obj, bytes) and len(data.obj) == len(data) else bytes(data)


class _File:
    """A member being written into the file `path`, open as `descriptor`, in pieces; `size` is the member's."""

    def __init__(self, descriptor: int, path: str, size: int) -> None:
        self.descriptor = descriptor
        self.path = path
        self.size = size

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        raise NotImplementedError

    def end(self) -> Increment | None:
        """Return if the member was as it must be: what a later run has to know of it."""


class _WholeFile(_File):
    """A file that comes from one base backup, and is checked while it is written."""

    def __init__(
        self, descriptor: int, path: str, name: str, digest: int, size: int, key: str, manifest: Manifest | None
    ) -> None:
        super().__init__(descriptor, path, size)
        self._name = name
        self._digest = digest
        self._key = key
        self._manifest = manifest
        self._checksum = 0

    def write(self, data: memoryview) -> None:
        if self._manifest is not None:
            self._checksum = google_crc32c.extend(self._checksum, _as_bytes(data))
        while len(data):
            data = data[os.write(self.descriptor, data) :]

    def end(self) -> Increment | None:
        if self._manifest is not None and not self._manifest.matches_digest(self._digest, self.size, self._checksum):
            raise RepositoryCorrupt(
                f"{self._name} in {self._key} is not as long as {self._manifest.key} says, or has another CRC32C",
                hint="The object was damaged or replaced: bring back a copy, or use another backup.",
            )
        return None


class _IncrementedFile(_File):
    """A file of which this base backup has an increment, and older ones the rest."""

    def __init__(self, descriptor: int, path: str, name: str, size: int, key: str, building: Building) -> None:
        super().__init__(descriptor, path, size)
        self._name = name
        self._built = building.built
        self._applier = IncrementApplier(descriptor, size, f"of {name} in {key}", self._pages)

    def _pages(self, file_bytes: int) -> WrittenPages:
        if self._name not in self._built:
            os.ftruncate(self.descriptor, file_bytes)
            self._built[self._name] = WrittenPages(file_bytes)
        return self._built[self._name]

    def write(self, data: memoryview) -> None:
        self._applier.write(data)

    def end(self) -> Increment | None:
        self._applier.finish()
        self._built[self._name].cut(self._applier.file_bytes)
        return Increment(self._name, self._applier.file_bytes, self._applier.blocks)


class _OldestFile(_File):
    """A whole file of which newer base backups had increments: what they did not have is added."""

    def __init__(self, descriptor: int, path: str, size: int, pages: WrittenPages) -> None:
        super().__init__(descriptor, path, size)
        self._pages = pages
        self._offset = 0

    def write(self, data: memoryview) -> None:
        begin = self._offset
        for start, stop in self._pages.wanted_runs(begin, begin + len(data)):
            write_at(self.descriptor, data[start - begin : stop - begin], start)
        self._offset += len(data)

    def end(self) -> Increment | None:
        self._pages.finish()
        return None
