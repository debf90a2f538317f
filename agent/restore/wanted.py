"""Which files come from which base backup of a chain.

A delta holds files whole, increments of files, and mentions unchanged ones ("skipped"). So what is wanted of a parent
is what its child, as far as that is itself wanted, has as an increment or skipped: files dropped since never appear,
and a file that a later delta holds whole is not taken from its parents. Source: WAL-G's backup_fetch_handler.go.

The lists are read as they arrive, one after the other, and kept as a byte a file and base backup, and eight bytes for
each file in its tars.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backups import Sentinel
from agent.repository.file_names import FileNames, digest_of
from agent.repository.keys import files_metadata_key
from agent.repository.parent_files import FilesReader, file_flags
from agent.repository.pieces import take_pieces
from agent.repository.tar_reader import path_below
from agent.tasks import in_thread

CONTROL_FILE = "global/pg_control"
LABEL_FILE = "backup_label"
MAP_FILE = "tablespace_map"
UTILITY_FILES = frozenset({CONTROL_FILE, LABEL_FILE, MAP_FILE})
"""Taken from the backup that is restored, never from its parents, whether they are listed or not."""

_STALE_FILES = frozenset({
    "postmaster.pid", "postmaster.opts", "recovery.conf", "recovery.signal", "standby.signal", "backup_label.old",
    "tablespace_map.old", "backup_manifest", "postgresql.auto.conf.tmp", "current_logfiles", "current_logfiles.tmp",
})  # fmt: skip
_OURS = "pitr."
# Directories of which only the directory is kept. Source: excludeDirContents in PostgreSQL's basebackup.c.
_STALE_STARTS = (
    _OURS, "pg_wal/", "pg_replslot/", "pg_dynshmem/", "pg_notify/", "pg_serial/", "pg_snapshots/", "pg_stat_tmp/",
    "pg_subtrans/",
)  # fmt: skip

_UNLISTED, _WHOLE, _INCREMENT, _SKIPPED = range(4)
_TakeEntry: TypeAlias = Callable[[str, bool, bool], None]
_TakeMember: TypeAlias = Callable[[str, str], None]


def is_stale(name: str) -> bool:
    """Tell whether the file `name` (a path below the data directory) is never restored."""
    return name in _STALE_FILES or name.startswith(_STALE_STARTS)


class Take(IntEnum):
    """How a file is taken from a base backup."""

    NOT = 0
    WHOLE = 1
    INCREMENT = 2


@dataclass(frozen=True, slots=True)
class FilesOfBackup:
    """What is taken from one base backup.

    takes: a `Take` for each of `FileNames`. tars: by the name of a tar, positions of the files in it; empty where that
    is not recorded.
    """

    backup: str
    takes: bytearray
    tars: Mapping[str, "array[int]"]


@dataclass(frozen=True, slots=True)
class WantedFiles:
    """The files and directories that a restored data directory has.

    names: their names; None: nothing is listed, and all that the one base backup holds is taken.
    sources: what comes from each base backup, the full one first.
    """

    names: FileNames | None
    sources: Sequence[FilesOfBackup]


async def read_wanted_files(store: ObjectStore, chain: Sequence[Sentinel]) -> WantedFiles:
    """Decide what to take from each base backup of `chain`, the full one first.

    Raises:
        RepositoryCorrupt: The lists of a delta and its parents do not fit together, or cannot be understood.
        RepositoryError: They could not be read.
    """
    listed = await _read_list(store, chain[-1])
    if not listed.digests:
        if len(chain) > 1:
            raise RepositoryCorrupt(
                f"base backup {chain[-1].name} is a delta, but its list of files is missing",
                hint="Bring back its files_metadata.json, or use another backup.",
            )
        return WantedFiles(None, [FilesOfBackup(chain[-1].name, bytearray(), {})])
    try:
        shares = await in_thread(_Shares, listed)
        for sentinel in reversed(chain[:-1]):
            del listed  # one at a time: each is as large as all that is kept of them
            listed = await _read_list(store, sentinel)
            await in_thread(shares.take, listed)
        return await in_thread(shares.wanted)
    except _Unknown as unknown:
        name = await name_of(store, chain[-1], unknown.digest)
        raise RepositoryCorrupt(unknown.problem.format(name=name), hint="Use another backup.") from None


@dataclass(slots=True)
class _List:
    """What a base backup says of its files, as digests: their kinds, and which tar holds which."""

    backup: str
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    kinds: bytearray = field(default_factory=bytearray)
    tars: dict[str, "array[int]"] = field(default_factory=dict)

    def add(self, name: str, is_incremented: bool, is_skipped: bool) -> None:
        """Add a file, unless it is one that is never restored, or is taken whether it is listed or not."""
        path = path_below(name, self.backup)
        if is_stale(path) or path in UTILITY_FILES:
            return
        self.digests.append(digest_of(path))
        self.kinds.append(_INCREMENT if is_incremented else _SKIPPED if is_skipped else _WHOLE)

    def add_member(self, tar: str, name: str) -> None:
        """Add a file to what a tar holds."""
        self.tars.setdefault(tar, array("Q")).append(digest_of(path_below(name, self.backup)))


async def _read_list(store: ObjectStore, sentinel: Sentinel) -> _List:
    result = _List(sentinel.name)
    await _read_entries(store, sentinel, result.add, result.add_member)
    return result


async def _read_entries(store: ObjectStore, sentinel: Sentinel, take: _TakeEntry, take_member: _TakeMember) -> None:
    """Tell `take` of each file that the base backup lists, and `take_member` of each member of a tar."""
    embedded, key = sentinel.embedded_files, files_metadata_key(sentinel.name)
    if embedded is not None:  # as WAL-G did up to 1.0
        for name, description in embedded.files.items():
            take(name, description.is_incremented, description.is_skipped)
        for tar, names in embedded.tar_file_sets.items():
            for name in names:
                take_member(tar, name)
    if embedded is not None or sentinel.files_metadata_disabled:
        return
    reader = FilesReader(key, take_member)

    def take_piece(piece: bytes) -> None:
        for name, values in reader.take(piece):
            take(name, *file_flags(key, name, values))

    if await take_pieces(store, key, take_piece):
        reader.finish()


class _Unknown(Exception):
    """A file, known by its digest only, has the `problem` that names it as {name}."""

    def __init__(self, digest: int, problem: str) -> None:
        super().__init__(problem)
        self.digest = digest
        self.problem = problem


async def name_of(store: ObjectStore, sentinel: Sentinel, digest: int) -> str:
    """Return the name with this digest that the base backup lists; raise as the first reading may."""
    found: list[str] = []

    def take(name: str, _incremented: bool, _skipped: bool) -> None:
        path = path_below(name, sentinel.name)
        if not found and digest_of(path) == digest:
            found.append(path)

    await _read_entries(store, sentinel, take, lambda _tar, _name: None)
    return found[0] if found else "a file"


class _Shares:
    """What comes from each base backup, decided list by list, of the newest base backup first."""

    def __init__(self, newest: _List) -> None:
        import numpy as np

        self._names = FileNames(newest.digests)
        self._needed = np.ones(len(self._names), np.bool_)
        self._sources: list[FilesOfBackup] = []
        self.take(newest)

    def take(self, listed: _List) -> None:
        """Decide what comes from the next older base backup; raise `_Unknown` if it does not list what it must."""
        import numpy as np

        names = self._names
        kinds = np.zeros(len(names), np.uint8)
        positions = names.positions(listed.digests)
        kinds[positions[positions >= 0]] = np.frombuffer(listed.kinds, np.uint8)[positions >= 0]
        if not listed.digests:  # a full one that came without a list: all that is wanted is in it
            kinds[:] = _WHOLE
        if unlisted := np.flatnonzero(self._needed & (kinds == _UNLISTED)).tolist():
            raise _Unknown(
                names.digest(unlisted[0]),
                f"base backup {listed.backup} does not list {{name}}, which a delta on top of it builds on",
            )
        takes = np.where(self._needed & (kinds != _SKIPPED), kinds, Take.NOT).astype(np.uint8)
        tars = {tar: _held(names, digests) for tar, digests in listed.tars.items()}
        self._sources.insert(0, FilesOfBackup(listed.backup, bytearray(takes.tobytes()), tars))
        self._needed &= kinds != _WHOLE

    def wanted(self) -> WantedFiles:
        """Return the decision on all of them; raise `_Unknown` if the oldest does not hold what it must."""
        import numpy as np

        if left := np.flatnonzero(self._needed).tolist():
            raise _Unknown(
                self._names.digest(left[0]),
                f"base backup {self._sources[0].backup} is a full one, but does not hold {{name}}",
            )
        return WantedFiles(self._names, self._sources)


def _held(names: FileNames, digests: "array[int]") -> "array[int]":
    positions = names.positions(digests)
    return array("q", positions[positions >= 0].tobytes())
