"""The files of a running server's data directory that belong into a base backup.

What is left out is what PostgreSQL's own base backup leaves out, what WAL-G leaves out, and what would poison a restore
(signal files, labels of other backups). A directory left out keeps its entry: the server does not start without some of
them. Everything here blocks for file I/O: call it in a thread.

Source: excludeDirContents, excludeFiles and sendDir() in PostgreSQL's src/backend/backup/basebackup.c.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import structlog

from agent.errors import BackupFailed

CONTROL_FILE = "/global/pg_control"
_REQUIRED = ("/PG_VERSION", "/global/pg_filenode.map")

# Matched by the last part of a name, at any depth.
_EMPTIED_DIRECTORIES = frozenset({
    "log", "pg_log", "pg_xlog", "pg_wal", "pgsql_tmp", "pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial",
    "pg_stat_tmp", "pg_snapshots", "pg_subtrans",
})  # fmt: skip
_LEFT_OUT = frozenset({
    "postmaster.pid", "postmaster.opts", "backup_label", "backup_label.old", "tablespace_map", "tablespace_map.old",
    "standby.signal", "recovery.signal", "recovery.conf", "backup_manifest", "postgresql.auto.conf.tmp",
    "current_logfiles", "current_logfiles.tmp", "lost+found", ".DS_Store",
})  # fmt: skip
_LEFT_OUT_PREFIXES = ("pg_internal.init", "pgsql_tmp", "pitr.")  # pitr.: the agent's own, as is the suffix
_LEFT_OUT_SUFFIX = ".pitr-new"

_BATCH_NAMES = 10_000
_HOLE_SECONDS = 5.0  # longer than removing a file of 1 GB takes
_HOLE_TRIES = 50

_DATABASE = re.compile(r"/base/\d+|/pg_tblspc/\d+/PG_[^/]+/\d+")
_MAY_VANISH = re.compile(r"/base/|/pg_tblspc/")  # databases and tablespaces are dropped while a backup runs
# Source: looks_like_temp_rel_name() in PostgreSQL's src/backend/storage/file/fd.c.
_TEMPORARY_RELATION = re.compile(r"t\d+_\d+(?:_(?:fsm|vm|init))?(?:\.\d+)?")
_RELATION = re.compile(r"(\d+)(?:_(?:fsm|vm))?(?:\.\d+)?")
_RELATION_FILE = re.compile(r"(?:/base/\d+|/global|/pg_tblspc/\d+/PG_[^/]+/\d+)/\d+(?:_(?:fsm|vm|init))?(?:\.(\d+))?")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DataFile:
    """A regular file or a directory of the backup.

    name: its name in the tar: `/` and the path below the data directory, tablespaces as `/pg_tblspc/<oid>/...`; bytes
        that are no UTF-8 as surrogates.
    path: where its content is read.
    status: as found just before it was handed out; that of the target for a symbolic link.
    """

    name: str
    path: str
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        """Whether this is a directory: an entry without content."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def size(self) -> int:
        """Size of the content in bytes, 0 for a directory."""
        return 0 if self.is_directory else self.status.st_size

    @property
    def may_vanish(self) -> bool:
        """Whether the file may be gone when it is opened, as after DROP TABLE: replay of the WAL does not miss it."""
        return self.name not in _REQUIRED


def relation_file_number(name: str) -> int | None:
    """Return which file of its relation `name` is, 0 for the first; None if it is no relation file."""
    match = _RELATION_FILE.fullmatch(name)
    return None if match is None else int(match[1] or 0)


def refused(path: str, error: OSError) -> BackupFailed:
    """Return the error that says why `path` of the data directory cannot be backed up."""
    return BackupFailed(
        f"{path} cannot be read: {error.strerror}",
        hint="Run the agent as the user that owns the data directory, with all of its volumes mounted.",
    )


def tablespaces(data_directory: Path) -> dict[int, str]:
    """Return the tablespaces that lie outside `data_directory`: OID to the directory, as its link says.

    Raises:
        BackupFailed: The links cannot be read.
    """
    folder = data_directory / "pg_tblspc"
    result: dict[int, str] = {}
    for name in _listing("/pg_tblspc", str(folder)):
        try:
            if name.isdecimal() and stat.S_ISLNK(os.lstat(folder / name).st_mode):
                result[int(name)] = str((folder / name).readlink())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise refused(str(folder / name), error) from error
    return result


def approximate_bytes(data_directory: Path, version_directory: str, spaces: Mapping[int, str]) -> int:
    """Return about how many bytes `walk` will yield, in a fraction of its time: some that it leaves out are counted."""
    folders = [str(data_directory), *(f"{location}/{version_directory}" for location in spaces.values())]
    result = 0
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:  # the walk tells what cannot be read
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        result += entry.stat(follow_symlinks=False).st_size
                elif entry.name not in _EMPTIED_DIRECTORIES:
                    folders.append(entry.path)
    return result


def walk(
    data_directory: Path,
    version_directory: str,
    spaces: Mapping[int, str],
    *,
    segment_bytes: int = 1 << 30,
    hole_seconds: float = _HOLE_SECONDS,
) -> Iterator[DataFile]:
    """Yield the directories and files of the backup, a directory before what is in it, but not `global/pg_control`.

    Each is described as it is when it is handed out. What vanishes meanwhile is passed over. A symbolic link is
    replaced by what it leads to: links outside pg_tblspc would not survive a restore.

    Args:
        data_directory: PGDATA.
        version_directory: Name of the directory in each tablespace that belongs to this server's version
            (`PG_15_202209061`); others may be leftovers of pg_upgrade.
        spaces: The tablespaces that lay outside when the backup started. The files of a later one must not be stored:
            replay of its creation would find its place taken.
        segment_bytes: Size of every file of a relation but the last.
        hole_seconds: How long one may be missing before another, as while the relation is dropped.

    Raises:
        BackupFailed: Something cannot be read that must not be missing, or a relation has a hole.
    """
    return _Walk(data_directory, version_directory, spaces, segment_bytes, hole_seconds).all()


def _listing(name: str, path: str) -> Iterator[str]:
    """Return the names in a directory, sorted in batches.

    They are read at once, since the directory changes while its files are copied, and kept packed: a dozen bytes each
    instead of seventy, for a database with millions of files.
    """
    packed: list[bytes] = []
    try:
        with os.scandir(path) as entries:
            while batch := sorted(entry.name for entry in islice(entries, _BATCH_NAMES)):
                packed.append(os.fsencode("\0".join(batch)))
    except FileNotFoundError as error:
        if not _MAY_VANISH.match(name):
            raise refused(path, error) from error
    except OSError as error:
        raise refused(path, error) from error
    return (base for names in packed for base in os.fsdecode(names).split("\0"))


def _size_of(path: str) -> int:
    """Return the size of a file, 0 if there is none."""
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def _is_utf8(base: str) -> bool:
    try:
        base.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identities(paths: Iterable[str]) -> Iterator[tuple[int, int]]:
    for path in paths:
        with suppress(OSError):  # the walk meets it again, and can say what it is
            yield _identity(Path(path).stat())


class _Walk:
    def __init__(
        self,
        data_directory: Path,
        version_directory: str,
        spaces: Mapping[int, str],
        segment_bytes: int,
        hole_seconds: float,
    ) -> None:
        self._segment_bytes = segment_bytes
        self._hole_seconds = hole_seconds
        self._root = str(data_directory)
        self._version_directory = version_directory
        self._spaces = spaces
        try:
            self._root_status = data_directory.stat()
        except OSError as error:
            raise refused(self._root, error) from error
        # A tablespace below the data directory is stored once, as a tablespace.
        self._locations = set(_identities(spaces.values()))

    def all(self) -> Iterator[DataFile]:
        for name in _REQUIRED:
            if not Path(self._root + name).is_file():
                raise BackupFailed(f"{self._root}{name} is missing", hint="Set PGDATA to the server's data directory.")
        yield DataFile("/", self._root, self._root_status)
        yield from self._content("", self._root, (_identity(self._root_status),))

    def _content(self, name: str, path: str, above: tuple[tuple[int, int], ...]) -> Iterator[DataFile]:
        in_database = _DATABASE.fullmatch(name) is not None
        for base in _listing(name, path):
            if base in _LEFT_OUT:
                continue
            child_name, child_path = f"{name}/{base}", f"{path}/{base}"
            if not _is_utf8(base):
                log.warning("file name is not UTF-8: restored by pitr, not by WAL-G", path=child_path)
            try:
                status = os.lstat(child_path)
                if stat.S_ISLNK(status.st_mode):
                    yield from self._link(child_name, child_path, base, above)
                elif stat.S_ISDIR(status.st_mode):
                    yield from self._directory(child_name, child_path, base, status, above)
                elif stat.S_ISREG(status.st_mode) and self._belongs(child_name, path, base, in_database):
                    if relation_file_number(child_name):
                        self._require_segment_before(child_path)
                    yield DataFile(child_name, child_path, status)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise refused(child_path, error) from error

    def _require_segment_before(self, path: str) -> None:
        """Raise unless the file of a relation before `path`, which is not its first, has its full size.

        A hole is not noticed by PostgreSQL: to it the relation ends there. While one is dropped or cut, there may be
        a hole for a moment; what it is cut to leaves empty files behind, before which anything may be.
        Source: mdunlinkfork(), mdtruncate() in PostgreSQL's src/backend/storage/smgr/md.c.
        """
        relation, _, number = path.rpartition(".")
        before = relation if number == "1" else f"{relation}.{int(number) - 1}"
        size = 0
        for _ in range(_HOLE_TRIES):
            size = _size_of(before)
            if size == self._segment_bytes or not _size_of(path):
                return
            time.sleep(self._hole_seconds / _HOLE_TRIES)
        raise BackupFailed(
            f"{path} is there, but {before}, the part of the relation before it, has {size} of {self._segment_bytes} "
            "bytes: PostgreSQL does not see the rows from there on",
            hint="Find out what happened to that file; an older base backup has it.",
        )

    def _belongs(self, name: str, folder: str, base: str, in_database: bool) -> bool:
        if name == CONTROL_FILE or base.startswith(_LEFT_OUT_PREFIXES) or base.endswith(_LEFT_OUT_SUFFIX):
            return False
        if not in_database:
            return True
        if _TEMPORARY_RELATION.fullmatch(base):
            return False
        # An unlogged relation is only its init fork. Asked now, not when the directory was listed: copied without its
        # init fork, the main fork would be in the way when recovery resets the relation.
        relation = _RELATION.fullmatch(base)
        # `access` because it raises nothing: of nearly every file there is none.
        return relation is None or not os.access(f"{folder}/{relation[1]}_init", os.F_OK)

    def _directory(
        self, name: str, path: str, base: str, status: os.stat_result, above: tuple[tuple[int, int], ...]
    ) -> Iterator[DataFile]:
        yield DataFile(name, path, status)
        if base in _EMPTIED_DIRECTORIES:
            if name == "/pg_wal":
                yield DataFile("/pg_wal/archive_status", path, status)
        elif _identity(status) not in self._locations:
            yield from self._content(name, path, (*above, _identity(status)))

    def _link(self, name: str, path: str, base: str, above: tuple[tuple[int, int], ...]) -> Iterator[DataFile]:
        if name.startswith("/pg_tblspc/") and base.isdecimal():
            if int(base) in self._spaces:
                yield from self._tablespace(name, path, above)
            return
        if base in _EMPTIED_DIRECTORIES:
            yield from self._directory(name, path, base, self._root_status, above)
            return
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            log.warning("link leads nowhere and is not backed up", path=path)
            return
        if stat.S_ISREG(status.st_mode):
            yield DataFile(name, path, status)
        elif stat.S_ISDIR(status.st_mode):
            if _identity(status) in above:
                raise BackupFailed(f"{path} is a link to a directory that it is in", hint="Remove the link.")
            yield from self._directory(name, path, base, status, above)

    def _tablespace(self, name: str, link: str, above: tuple[tuple[int, int], ...]) -> Iterator[DataFile]:
        path = f"{link}/{self._version_directory}"
        try:
            status = os.lstat(path)
        except OSError as error:
            if not os.path.lexists(link):
                return
            raise BackupFailed(
                f"tablespace {name[11:]} in {Path(link).readlink()} cannot be read: {error.strerror}",
                hint="Mount the tablespace's volume into the agent's container, at the same path.",
            ) from error
        yield from self._directory(f"{name}/{self._version_directory}", path, self._version_directory, status, above)
