"""What the agent reads in PGDATA besides base backups. It never writes here outside restore mode.

Every function blocks for file I/O: call them in a thread. Names are validated by the caller's grammar
(`wal_file_kind`) before they come here, and files are opened without following links (no path from outside is used).
"""

import os
import socket
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from agent.domain.control_file import ControlFile, parse_control_file
from agent.domain.timeline import Ancestor, history_name, parse_history
from agent.domain.wal import WalFileKind, archive_order, wal_file_kind
from agent.errors import ConfigError
from agent.postgres.wal_file import FileState, WalFile, file_state, open_wal_file

_READ_TRIES = 10  # pg_control is overwritten in place; pgBackRest retries a torn read likewise
_READ_PAUSE_SECONDS = 0.02
_CONNECT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class WalDirectory:
    """Where the WAL files are. `identity` (device and inode number) tells it from every other directory."""

    path: Path
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """Names of the WAL files that PostgreSQL wants archived, and of those that it believes archived."""

    ready: frozenset[str]
    done: frozenset[str]


class DataDirectory:
    """Reads the control file, WAL files and archive status of the data directory at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Tell whether an initialised data directory is here.

        Raises:
            OSError: That cannot be seen, as where it belongs to another user: `Path.exists` says no then, from Python
                3.14 on.
        """
        try:
            (self.path / "PG_VERSION").stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def owner(self) -> int:
        """Return the uid that owns the data directory: PostgreSQL's.

        Raises:
            ConfigError: There is no such directory.
        """
        try:
            return self.path.stat().st_uid
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def control_file(self) -> ControlFile:
        """Read global/pg_control; raises as `control_file_content` does."""
        return parse_control_file(self.control_file_content(), google_crc32c.value)

    def control_file_content(self) -> bytes:
        """Return the bytes of global/pg_control, read again if they were caught in the middle of a write.

        Raises:
            ConfigError: It is absent, unreadable, damaged or of an unknown version.
        """
        path = self.path / "global" / "pg_control"
        for attempt in range(_READ_TRIES):
            try:
                content = path.read_bytes()
                parse_control_file(content, google_crc32c.value)
            except OSError as error:
                raise _unreadable(path, error) from error
            except ValueError as error:
                if attempt == _READ_TRIES - 1:
                    raise ConfigError(f"{path}: {error}", hint="Check that PGDATA is a data directory.") from error
                time.sleep(_READ_PAUSE_SECONDS)
            else:
                return content
        raise AssertionError("the last try returns or raises")

    def wal_directory(self) -> WalDirectory:
        """Return the directory pg_wal, whatever its path is elsewhere.

        Raises:
            ConfigError: It cannot be read.
        """
        path = self.path / "pg_wal"
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        return WalDirectory(path, (status.st_dev, status.st_ino))

    def wal_file_state(self, name: str) -> FileState | None:
        """Describe pg_wal/`name`, or return None if it is not there.

        Raises:
            ConfigError: It cannot be looked at.
        """
        path = f"{self.path}/pg_wal/{name}"  # of 50,000 names, paths as objects would take half the time
        try:
            return file_state(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def open_wal_file(self, name: str) -> AbstractContextManager[WalFile]:
        """Open pg_wal/`name`; raises as the function of this name."""
        return open_wal_file(self.path / "pg_wal" / name)

    def ready_files(self) -> list[str]:
        """Return the names of the WAL files that PostgreSQL wants archived, in its own order.

        Raises:
            ConfigError: They cannot be listed.
        """
        return sorted(self.archive_status().ready, key=archive_order)

    def archive_status(self) -> ArchiveStatus:
        """Return what PostgreSQL has noted in pg_wal/archive_status.

        Raises:
            ConfigError: It cannot be read.
        """
        names: dict[str, set[str]] = {".ready": set(), ".done": set()}
        for entry in _names_in(self.path / "pg_wal" / "archive_status"):
            name, dot, ending = entry.rpartition(".")
            if dot + ending in names and wal_file_kind(name) is not None:
                names[dot + ending].add(name)
        return ArchiveStatus(frozenset(names[".ready"]), frozenset(names[".done"]))

    def segment_names(self) -> list[str]:
        """Return the names of the WAL segments in pg_wal; those after the newest are for later use, not written.

        Raises:
            ConfigError: It cannot be read.
        """
        names = _names_in(self.path / "pg_wal")
        return [name for name in names if wal_file_kind(name) is WalFileKind.SEGMENT]

    def timeline_history(self, timeline: int) -> tuple[Ancestor, ...]:
        """Read the history file of the server's own timeline.

        Raises:
            ConfigError: It is not in pg_wal, or cannot be understood.
        """
        if timeline == 1:
            return ()
        path = self.path / "pg_wal" / history_name(timeline)
        try:
            return parse_history(timeline, path.read_text("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}", hint="Fetch it from the archive into pg_wal."
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", hint="Fetch it from the archive into pg_wal.") from error

    def wal_volume_free_bytes(self) -> int:
        """Return how many bytes PostgreSQL can still write to the volume of pg_wal.

        Raises:
            ConfigError: There is no such directory.
        """
        path = self.path / "pg_wal"
        try:
            volume = os.statvfs(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        return volume.f_bavail * volume.f_frsize

    def ready_since(self, name: str) -> float | None:
        """Return when (seconds since the epoch) PostgreSQL marked `name` ready, or None if that is not known."""
        try:
            return os.lstat(self.path / "pg_wal" / "archive_status" / f"{name}.ready").st_mtime
        except OSError:
            return None

    def postmaster_status(self) -> str | None:
        """Return what the server says of itself (starting, ready, standby, stopping), or None if none runs.

        Source: LOCK_FILE_LINE_PM_STATUS in PostgreSQL's src/include/utils/pidfile.h.
        """
        try:
            lines = (self.path / "postmaster.pid").read_text().splitlines()
        except OSError:
            return None
        return lines[7].strip() if len(lines) > 7 else "starting"

    def is_server_gone(self) -> bool:
        """Tell whether no server runs here: it has removed its postmaster.pid, or was killed and left it.

        Of the latter its socket tells, if it is in sight: whoever listens does not refuse. The process id tells
        nothing, it is of another container.
        Source: LOCK_FILE_LINE_PORT and LOCK_FILE_LINE_SOCKET_DIR in PostgreSQL's src/include/utils/pidfile.h.
        """
        try:
            lines = (self.path / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        if len(lines) < 5 or not lines[4]:
            return False
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_CONNECT_SECONDS)
                probe.connect(f"{lines[4]}/.s.PGSQL.{lines[3]}")
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False


def _names_in(directory: Path) -> list[str]:
    """Return the names in `directory`, none if it does not exist."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - names, not paths: there may be 50,000
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error


def _unreadable(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {error.strerror}",
        hint="Set PGDATA to PostgreSQL's data directory, mount its volumes into this container, and run the agent as a "
        "user that may read them.",
    )
