"""Writes the members of base backups' tars into a data directory.

Left out, whatever a backup holds: what would act again on a restored server (signal files, a postmaster.pid, labels of
other backups, replication slots), links, and the agent's own files.

Everything here blocks for file I/O and is called in threads, for several tars at once.
"""

import os
from pathlib import Path

import structlog

from agent.errors import RepositoryCorrupt
from agent.repository.increments import IncrementApplier
from agent.repository.tar_reader import Member, MemberKind
from agent.restore.wanted import CONTROL_FILE, LABEL_FILE, MAP_FILE, UTILITY_FILES, WantedFiles, path_below

UNFINISHED_CONTROL_FILE = f"{CONTROL_FILE}.pitr-new"
"""Where pg_control is kept until everything else is in place."""

_STALE_FILES = frozenset({
    "postmaster.pid", "postmaster.opts", "recovery.conf", "recovery.signal", "standby.signal", "backup_label.old",
    "tablespace_map.old", "backup_manifest", "postgresql.auto.conf.tmp", "current_logfiles", "current_logfiles.tmp",
})  # fmt: skip
_OURS = "pitr."
# Directories of which only the directory is kept. Source: excludeDirContents in PostgreSQL's basebackup.c.
_STALE_CONTENT = (
    "pg_wal/", "pg_replslot/", "pg_dynshmem/", "pg_notify/", "pg_serial/", "pg_snapshots/", "pg_stat_tmp/",
    "pg_subtrans/",
)  # fmt: skip

log = structlog.get_logger()


def is_stale(name: str) -> bool:
    """Tell whether the file `name` (a path below the data directory) is never restored."""
    return name in _STALE_FILES or name.startswith((_OURS, *_STALE_CONTENT))


class Unpacking:
    """One base backup being unpacked into `data_directory`: what is wanted of it, and what has arrived."""

    def __init__(self, wanted: WantedFiles, data_directory: Path) -> None:
        self.wanted = wanted
        self.data_directory = data_directory
        self.arrived: set[str] = set()

    def require_all(self) -> None:
        """Return if every file and directory that is wanted has arrived, else raise `RepositoryCorrupt`."""
        missing = [name for name in self.wanted.names or () if name not in self.arrived and not is_stale(name)]
        if missing:
            raise RepositoryCorrupt(
                f"base backup {self.wanted.backup} lacks {len(missing)} of the files it lists, as {min(missing)}",
                hint="A tar of it was lost or replaced: bring it back, or use another backup.",
            )


class Unpacker:
    """A `MemberSink` that writes the members of the tar stored as `key`."""

    def __init__(self, unpacking: Unpacking, key: str) -> None:
        self._unpacking = unpacking
        self._key = key
        self._name: str | None = None
        self._descriptor: int | None = None
        self._mode = 0
        self._increment: IncrementApplier | None = None

    def begin(self, member: Member) -> None:
        """As `MemberSink`."""
        name = path_below(member.name, self._key)
        self._name = name if self._is_wanted(member, name) else None
        if self._name is None:
            return
        if member.kind is MemberKind.DIRECTORY:
            path = self._unpacking.data_directory / name
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if name:
                path.chmod(member.mode & 0o777 | 0o700)
            return
        self._mode = member.mode & 0o777 | 0o600
        if name in self._unpacking.wanted.increments:
            self._descriptor = self._open_existing(name)
            self._increment = IncrementApplier(self._descriptor, member.size, f"of {name} in {self._key}")
        else:
            self._descriptor = self._create(name)

    def write(self, data: memoryview) -> None:
        """As `MemberSink`."""
        if self._increment is not None:
            self._increment.write(data)
        elif self._descriptor is not None:
            while len(data):
                data = data[os.write(self._descriptor, data) :]

    def end(self) -> None:
        """As `MemberSink`."""
        if self._increment is not None:
            self._increment.finish()
        elif self._descriptor is not None:
            os.fchmod(self._descriptor, self._mode)
        self.close()
        if self._name is not None:
            self._unpacking.arrived.add(self._name)

    def close(self) -> None:
        """Close the file being written, if there is one."""
        descriptor, self._descriptor, self._increment = self._descriptor, None, None
        if descriptor is not None:
            os.close(descriptor)

    def _is_wanted(self, member: Member, name: str) -> bool:
        wanted = self._unpacking.wanted
        if member.kind is MemberKind.OTHER:
            log.warning("link or device in a base backup left out", key=self._key, name=member.name)
            return False
        if name in UTILITY_FILES:
            # With a slash it is what lay in the data directory: of another backup.
            is_stale_label = name in (LABEL_FILE, MAP_FILE) and member.name.startswith("/")
            return wanted.is_target and not is_stale_label
        if is_stale(name):
            return False
        if member.kind is MemberKind.DIRECTORY and wanted.is_target:
            return True
        return wanted.names is None or name in wanted.names

    def _create(self, name: str) -> int:
        # pg_control alone may come twice: some backups have it in a part besides its own tar.
        path = self._unpacking.data_directory / (UNFINISHED_CONTROL_FILE if name == CONTROL_FILE else name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_TRUNC if name == CONTROL_FILE else os.O_EXCL
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, flags, 0o600)
        except FileExistsError:
            raise RepositoryCorrupt(
                f"base backup {self._unpacking.wanted.backup} holds {name} twice; the second is in {self._key}",
                hint="An object was added to its tar_partitions: remove what does not belong there.",
            ) from None

    def _open_existing(self, name: str) -> int:
        try:
            return os.open(self._unpacking.data_directory / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RepositoryCorrupt(
                f"{self._key} holds an increment of {name}, but the base backups before it do not hold that file",
                hint="Use another backup.",
            ) from None
