"""What lies in a directory that is restored into already: taken over, kept where it is right, removed where it is not.

`take_over` makes the data directory of a stopped server of the same database cluster one that a restore may fill, for
`PITR_RESTORE_DELTA`. `Sweep` then goes through what is there. All functions block for file I/O.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from agent.domain.control_file import ClusterState, ControlFile, parse_control_file
from agent.errors import ConfigError
from agent.postgres.data_directory import DataDirectory
from agent.postgres.durable import fsync_directory
from agent.repository.file_names import FileNames
from agent.restore.manifest import checksum_of
from agent.restore.marker import NOBODYS, MarkerStage, RestoreMarker, read_marker
from agent.restore.tablespaces import CLAIM, version_prefix
from agent.restore.unpacker import UNFINISHED_CONTROL_FILE, Building
from agent.restore.wanted import CONTROL_FILE, UTILITY_FILES

FORMER_CONTROL_FILE = f"{CONTROL_FILE}.pitr-old"
"""Where the control file of a directory that is taken over is kept until the restore begins."""

_STOPPED = (ClusterState.SHUT_DOWN, ClusterState.SHUT_DOWN_IN_RECOVERY)
_CHUNK_FILES = 500


def directories_below(top: Path) -> Iterator[Path]:
    """Yield all directories in `top`, each after those in it, and `top` last; the names of files are not kept.

    Symbolic links are not followed, and `lost+found`, which root alone may read, is left out. What it yields may be
    removed. Raises `OSError`.
    """
    with os.scandir(top) as entries:
        found = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    directories = [Path(entry.path) for entry in found if entry.name != "lost+found"]
    for directory in directories:
        yield from directories_below(directory)
    yield top


def holds_data(data_directory: Path) -> bool:
    """Tell whether the directory holds what is to be taken over: anything but what an interrupted restore left."""
    if not data_directory.is_dir() or not {entry.name for entry in data_directory.iterdir()} - NOBODYS:
        return False
    return not _is_interrupted(read_marker(data_directory), data_directory)


def require_same_cluster(data_directory: Path, system_identifier: int | None) -> None:
    """Return if `data_directory` may be restored over with a base backup of the cluster `system_identifier`.

    What a restore has begun to fill has no control file in its place, and is of the cluster that its marker names: the
    server that may have been there before has been asked the rest.

    Raises:
        ConfigError: It is no data directory of that cluster, a server may run in it, or its WAL may not be archived.
        OSError: It cannot be read.
    """
    marker = read_marker(data_directory)
    if marker is not None and _is_interrupted(marker, data_directory):
        _require_same(data_directory, marker.system_identifier, system_identifier)
        return
    control = _control_file(data_directory)
    _require_same(data_directory, control.system_identifier, system_identifier)
    require_no_server(data_directory)
    _require_archived(data_directory, control)


def require_no_server(data_directory: Path) -> None:
    """Raise `ConfigError` if a server runs in `data_directory`, or may."""
    if not DataDirectory(data_directory).is_server_gone():
        raise ConfigError(
            f"a server runs in {data_directory}, or its postmaster.pid is from another host",
            hint="Stop PostgreSQL; if none runs anywhere on this volume, remove postmaster.pid and run it again.",
        )


def take_over(data_directory: Path, system_identifier: int | None) -> None:
    """Make a data directory one in which no server can start, if `require_same_cluster` lets; durable on return.

    Only its `global/pg_control` is put aside, so until the restore begins this can be taken back by hand. May be
    repeated after a crash. Raises as that.
    """
    require_same_cluster(data_directory, system_identifier)
    path = data_directory / CONTROL_FILE
    if path.exists():
        path.rename(data_directory / FORMER_CONTROL_FILE)
        fsync_directory(path.parent)


def _is_interrupted(marker: RestoreMarker | None, data_directory: Path) -> bool:
    """Tell whether a restore has begun to fill the directory, and has not come to the end.

    What was killed after pg_control was in its place is complete, whatever its marker says: a server may run there.
    """
    is_begun = marker is not None and marker.stage is MarkerStage.HYDRATING
    return is_begun and not (data_directory / CONTROL_FILE).exists()


def _require_same(data_directory: Path, found: int | None, system_identifier: int | None) -> None:
    if system_identifier is None or found != system_identifier:
        raise ConfigError(
            f"{data_directory} is of the database cluster {found or 'that a restore was begun of, and not named'}, "
            f"but the base backup is of {system_identifier or 'one that it does not name'}",
            hint="Restore into an empty directory, or set PGDATA to that of the cluster that was backed up.",
        )


def _control_file(data_directory: Path) -> ControlFile:
    for name in (CONTROL_FILE, FORMER_CONTROL_FILE, UNFINISHED_CONTROL_FILE):
        path = data_directory / name
        try:
            return parse_control_file(path.read_bytes(), google_crc32c.value)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", hint="Restore into an empty directory.") from error
    raise ConfigError(
        f"{data_directory} is not empty, and has no {CONTROL_FILE} that tells which database cluster it is of",
        hint="Restore into an empty directory.",
    )


def _require_archived(data_directory: Path, control: ControlFile) -> None:
    """Return unless pg_wal may hold the only copy of what was committed last."""
    directory = DataDirectory(data_directory)
    status = directory.archive_status()
    waiting = set(status.ready)
    if control.state not in _STOPPED:
        waiting |= set(directory.segment_names()) - status.done
    if waiting:
        why = "" if control.state in _STOPPED else ", and its server was not stopped cleanly"
        raise ConfigError(
            f"{data_directory}/pg_wal has {len(waiting)} WAL files that may not be archived, up to {max(waiting)}{why}"
            ": restoring over it would lose them",
            hint="Start the server beside its agent and stop it, so that they are archived, or move them elsewhere.",
        )


class Sweep:
    """Goes through all that lies in a data directory and its tablespaces, and removes what does not stay.

    A file stays if its digest is in `arrived` (an earlier run has written it), or, where `by_content`, if the manifest
    proves it: then nothing is to be restored of it. In tablespaces only the folder of this `pg_version` is looked at.
    """

    def __init__(self, building: Building, arrived: FileNames, pg_version: int, *, by_content: bool) -> None:
        self._building = building
        self._arrived = arrived
        self._version_prefix = version_prefix(pg_version)
        self._manifest = building.manifest if by_content else None

    def chunks(self) -> Iterator[list[tuple[str, Path]]]:
        """Yield names and paths of all files, some at a time; each chunk is to be given to `handle`."""
        chunk: list[tuple[str, Path]] = []
        if self._manifest is not None:
            self._building.keep("")
        for file in self._files(self._building.data_directory, ""):
            chunk.append(file)
            if len(chunk) == _CHUNK_FILES:
                yield chunk
                chunk = []
        yield chunk

    def handle(self, chunk: list[tuple[str, Path]]) -> None:
        """Keep or remove each of these files; several threads may do so at once."""
        for name, path in chunk:
            if self._is_proven(name, path):
                self._building.keep(name)
            elif self._arrived.position(CONTROL_FILE if name == UNFINISHED_CONTROL_FILE else name) is None:
                path.unlink()

    def remove_empty_directories(self) -> None:
        """Remove the directories that hold nothing and are not in the base backup, as those of dropped databases."""
        names = self._building.wanted.names
        top = self._building.data_directory
        for directory in directories_below(top) if names is not None else ():
            name = str(directory.relative_to(top))
            if "/" in name and names is not None and names.position(name) is None:
                with contextlib.suppress(OSError):  # it holds something
                    directory.rmdir()

    def _is_proven(self, name: str, path: Path) -> bool:
        manifest = self._manifest
        if manifest is None or name in UTILITY_FILES or path.is_symlink():
            return False
        return manifest.proves(name, path.stat().st_size) and manifest.matches(name, *checksum_of(path))

    def _files(self, directory: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        with os.scandir(directory) as entries:
            for entry in entries:
                name, path = prefix + entry.name, Path(entry.path)
                if name.startswith("pitr.") or entry.name in (CLAIM, "lost+found"):
                    continue
                if _is_tablespace(prefix) and not entry.name.startswith(self._version_prefix):
                    continue
                if not entry.is_dir():
                    yield name, path
                elif entry.is_symlink() and not _may_be_link(name):
                    path.unlink()
                else:
                    if self._manifest is not None:
                        self._building.keep(name)
                    yield from self._files(path, f"{name}/")


def _may_be_link(name: str) -> bool:
    """Tell whether a directory of this name may be on another volume: the WAL, or a tablespace."""
    return name == "pg_wal" or _is_tablespace(f"{name}/")


def _is_tablespace(prefix: str) -> bool:
    return prefix.startswith("pg_tblspc/") and prefix.count("/") == 2
