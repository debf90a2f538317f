"""Fills a data directory from base backups.

Two steps, so that recovery settings are in place before PostgreSQL can start:

    claim(directory) -> [marker] -> hydrate(...) -> [recovery settings, signal file] -> finish(directory)

Invariants:
    Only a directory that is empty, or that carries our marker and no `global/pg_control`, is written to.
    Until `finish` there is no `global/pg_control`: PostgreSQL cannot start on half a database.
    Every file that the backup lists has arrived, once, and what was written is durable, when `hydrate` returns.
    Nothing is written outside the data directory and the directories of its tablespaces, whatever the tars say.

The marker is the caller's (`agent.restore.marker`), as is keeping others out of the directory.
"""

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import google_crc32c

from agent.domain.backup_label import parse_backup_label
from agent.domain.control_file import parse_control_file
from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.errors import ConfigError, RepositoryCorrupt, RestoreFailed
from agent.ports import ObjectInfo, ObjectStore
from agent.postgres.durable import fsync_directory
from agent.repository.backups import FilesMetadata, Sentinel, list_tars, read_files_metadata, read_sentinel
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_reader import read_tar
from agent.restore.manifest import place_manifest
from agent.restore.marker import MARKER_NAME
from agent.restore.tablespaces import (
    make_tablespaces,
    release_tablespaces,
    remove_tree,
    tablespace_directories,
    write_tablespace_map,
)
from agent.restore.unpacker import UNFINISHED_CONTROL_FILE, Unpacker, Unpacking
from agent.restore.wanted import CONTROL_FILE, LABEL_FILE, WantedFiles, path_below, wanted_files
from agent.tasks import in_thread, task_group
from agent.telemetry.progress import Progress, ReportProgress

_MOUNTED = "Run the restore as the user that PostgreSQL runs as, with the volume mounted writable."
NOBODYS = frozenset({"lost+found", f"{MARKER_NAME}.pitr-new"})

# What PostgreSQL needs to start, or to end a recovery, whether the backup stored it or not. Without pg_subtrans, for
# one, it replays everything, announces a new timeline, and dies.
_DIRECTORIES = (
    "base", "global", "pg_commit_ts", "pg_dynshmem", "pg_logical", "pg_logical/mappings", "pg_logical/snapshots",
    "pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "pg_notify", "pg_replslot", "pg_serial",
    "pg_snapshots", "pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase", "pg_wal",
    "pg_wal/archive_status", "pg_xact",
)  # fmt: skip

# Tars of the backup that is restored, unpacked after all parts.
_LAST_TARS = ("pg_control.tar", "backup_label.tar")


def is_writable(directory: Path) -> bool:
    """Tell whether `directory` is one, and this process may read it and write to it; False on a read-only mount."""
    return os.access(f"{directory}/.", os.R_OK | os.W_OK | os.X_OK)  # with "/." a file is refused


async def claim(data_directory: Path) -> None:
    """Return if `data_directory` may be restored into: it is absent (it is made then) or holds nothing of anybody.

    To be called before the marker is written: a directory with our marker and no `global/pg_control` is wiped by
    `hydrate`. `lost+found` is nobody's.

    Raises:
        ConfigError: It holds something, is no directory, or cannot be made, read or written.
    """
    try:
        await in_thread(lambda: data_directory.mkdir(mode=0o700, parents=True, exist_ok=True))
        found = await in_thread(lambda: {entry.name for entry in data_directory.iterdir()} - NOBODYS)
    except OSError as error:
        raise ConfigError(
            f"{data_directory} cannot be restored into: {error.strerror}",
            hint=_MOUNTED,
        ) from error
    if not await in_thread(is_writable, data_directory):
        raise ConfigError(f"{data_directory} cannot be restored into: it cannot be written", hint=_MOUNTED)
    if found:
        raise ConfigError(
            f"{data_directory} is not empty, it holds {min(found)}",
            hint="Restore into an empty directory; a restore never overwrites one.",
        )


async def hydrate(
    store: ObjectStore,
    objects: ObjectFormat,
    plan: RestorePlan,
    data_directory: Path,
    *,
    tablespace_map: Mapping[str, str],
    concurrency: int,
    report: ReportProgress,
) -> None:
    """Put all files of the plan's base backups into `data_directory`, `global/pg_control` under a temporary name.

    Everything left by an earlier, interrupted call is removed first. Stale state (signal files, postmaster.pid, an
    earlier label) is left out. What is written is durable on return.

    Args:
        store: The repository.
        objects: How its tars are packed.
        plan: Which base backups.
        data_directory: A claimed directory, see `claim`, since then with a marker.
        tablespace_map: Directory that a tablespace was in, to the one it goes to; others go back to where they were.
        concurrency: Tar parts downloaded and unpacked at once.
        report: Is told the stored bytes of the base backups read so far, of all.

    Raises:
        ConfigError: The directory, or one of a tablespace, cannot be used.
        RepositoryError: An object cannot be read, is damaged, or a file that the backup lists has not arrived.
        OSError: The volume failed, or is full.
    """
    sources = [await _source(store, backup.name) for backup in plan.chain]
    wanted = wanted_files([(source.sentinel.name, source.files) for source in sources])
    for source, files in zip(sources, wanted, strict=True):
        source.require_tars(files)
    directories = await in_thread(_prepare, data_directory, sources[-1].sentinel.tablespaces, tablespace_map)
    await _Hydration(store, objects, data_directory, concurrency, report).unpack(sources, wanted)
    await in_thread(_complete, data_directory)
    await in_thread(write_tablespace_map, directories, data_directory)
    await place_manifest(store, objects, plan.backup.name, data_directory)
    await in_thread(_check_control_file, data_directory / UNFINISHED_CONTROL_FILE, plan)
    await in_thread(_check_label, data_directory / LABEL_FILE, plan)
    for directory in (data_directory, *directories.values()):
        await _make_durable(directory, concurrency)


async def finish(data_directory: Path) -> None:
    """Put `global/pg_control` in its place: the last step, after which PostgreSQL can start. Durable on return.

    Raises:
        RestoreFailed: `hydrate` has not completed here.
        OSError: The volume failed.
    """
    unfinished = data_directory / UNFINISHED_CONTROL_FILE

    def put_in_place() -> None:
        unfinished.rename(data_directory / CONTROL_FILE)
        fsync_directory(unfinished.parent)
        release_tablespaces(data_directory)

    try:
        await in_thread(put_in_place)
    except FileNotFoundError:
        raise RestoreFailed(
            f"{data_directory} is not hydrated: it has no {UNFINISHED_CONTROL_FILE}", hint="Run the restore again."
        ) from None


class _Source:
    """One base backup of the chain: what its JSON objects say, and its tars."""

    def __init__(self, sentinel: Sentinel, files: FilesMetadata | None, tars: Sequence[ObjectInfo]) -> None:
        self.sentinel = sentinel
        self.files = files
        self._tars = tars

    def parts(self) -> list[ObjectInfo]:
        """Return the tars of ordinary files."""
        return [tar for tar in self._tars if not _base(tar.key).startswith(_LAST_TARS)]

    def last_tars(self) -> list[ObjectInfo]:
        """Return the tars of pg_control and of the label."""
        return [tar for tar in self._tars if _base(tar.key).startswith(_LAST_TARS)]

    def require_tars(self, wanted: WantedFiles) -> None:
        """Raise `RepositoryCorrupt` if a tar is absent that is known to hold something wanted, before any download."""
        present = {_stem(tar.key) for tar in self._tars}
        for tar, names in (self.files.tar_file_sets if self.files else {}).items():
            if _stem(tar) not in present and any(
                wanted.names is not None and path_below(name, tar) in wanted.names for name in names
            ):
                raise RepositoryCorrupt(
                    f"base backup {self.sentinel.name} lacks its {tar}", hint="Bring it back, or use another backup."
                )
        if not self.parts():
            raise RepositoryCorrupt(f"base backup {self.sentinel.name} has no tars", hint="Use another backup.")


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _stem(key: str) -> str:
    return _base(key).partition(".tar")[0]


async def _source(store: ObjectStore, name: str) -> _Source:
    sentinel = await read_sentinel(store, name)
    files = sentinel.embedded_files
    if files is None and not sentinel.files_metadata_disabled:
        files = await read_files_metadata(store, name)
    return _Source(sentinel, files, await list_tars(store, name))


class _Hydration:
    """Unpacks a chain of base backups, some tars at once, and reports the bytes."""

    def __init__(
        self,
        store: ObjectStore,
        objects: ObjectFormat,
        data_directory: Path,
        concurrency: int,
        report: ReportProgress,
    ) -> None:
        self._store = store
        self._objects = objects
        self._data_directory = data_directory
        self._limit = asyncio.Semaphore(concurrency)
        self._report = report
        self._done = 0
        self._total = 0

    async def unpack(self, sources: Sequence[_Source], wanted: Sequence[WantedFiles]) -> None:
        """Unpack one base backup after the other: an increment needs its file to be there."""
        target = sources[-1]
        self._total = sum(tar.size for source in sources for tar in source.parts())
        self._total += sum(tar.size for tar in target.last_tars())
        for source, files in zip(sources, wanted, strict=True):
            unpacking = Unpacking(files, self._data_directory)
            await self._unpack_all(unpacking, source.parts())
            if source is target:
                await self._unpack_all(unpacking, target.last_tars())
            unpacking.require_all()

    async def _unpack_all(self, unpacking: Unpacking, tars: Iterable[ObjectInfo]) -> None:
        async with task_group() as group:
            for tar in tars:
                group.create_task(self._unpack(unpacking, tar), name=f"unpack {tar.key}")

    async def _unpack(self, unpacking: Unpacking, tar: ObjectInfo) -> None:
        async with self._limit:
            unpacker = Unpacker(unpacking, tar.key)
            try:
                await read_tar(self._store, tar.key, self._objects, unpacker, self._read)
            finally:
                unpacker.close()

    def _read(self, count: int) -> None:
        self._done += count
        self._report(Progress("hydrating", self._done, self._total))


def _prepare(data_directory: Path, tablespaces: Mapping[int, str], moved: Mapping[str, str]) -> dict[int, Path]:
    """Empty the directories that are written to; return those of the tablespaces."""
    directories = tablespace_directories(tablespaces, moved, data_directory.absolute())
    _wipe(data_directory)
    make_tablespaces(directories, data_directory.absolute())
    return directories


def _wipe(data_directory: Path) -> None:
    """Remove what an interrupted call left; refuse what is not known to be that."""
    names = {entry.name for entry in data_directory.iterdir()} - NOBODYS
    if names - {MARKER_NAME} and (MARKER_NAME not in names or (data_directory / CONTROL_FILE).exists()):
        raise ConfigError(
            f"{data_directory} is not empty, and not what an interrupted restore left",
            hint="Restore into an empty directory; a restore never overwrites one.",
        )
    for name in names - {MARKER_NAME}:
        remove_tree(data_directory / name)


def _complete(data_directory: Path) -> None:
    for name in _DIRECTORIES:
        (data_directory / name).mkdir(mode=0o700, exist_ok=True)
    # PostgreSQL starts in no other (but 0750); a backup through the replication protocol has no mode for it.
    data_directory.chmod(0o700)


def _check_control_file(path: Path, plan: RestorePlan) -> None:
    backup = plan.backup
    try:
        control = parse_control_file(path.read_bytes(), google_crc32c.value)
    except FileNotFoundError:
        raise RepositoryCorrupt(f"base backup {backup.name} holds no pg_control", hint="Use another backup.") from None
    except ValueError as error:
        raise RepositoryCorrupt(f"base backup {backup.name}: {error}", hint="Use another backup.") from error
    if backup.system_identifier not in (None, control.system_identifier):
        raise RepositoryCorrupt(
            f"base backup {backup.name} is of the database cluster {control.system_identifier} by its pg_control, "
            f"but of {backup.system_identifier} by its sentinel",
            hint="Use another backup.",
        )
    if control.wal_segment_bytes != plan.segment_bytes:
        raise RepositoryCorrupt(
            f"base backup {backup.name} has WAL segments of {control.wal_segment_bytes} bytes, but the archived WAL "
            f"has {plan.segment_bytes}",
            hint="The WAL is of another database cluster, or was archived before pg_resetwal.",
        )


def _check_label(path: Path, plan: RestorePlan) -> None:
    """Without its label PostgreSQL recovers from the wrong checkpoint: corruption that nobody reports."""
    try:
        label = parse_backup_label(os.fsdecode(path.read_bytes()))
    except FileNotFoundError:
        raise RepositoryCorrupt(
            f"base backup {plan.backup.name} holds no backup_label", hint="Use another backup."
        ) from None
    except ValueError as error:
        raise RepositoryCorrupt(f"base backup {plan.backup.name}: {error}", hint="Use another backup.") from error
    if label.start_lsn != plan.backup.start_lsn:
        raise RepositoryCorrupt(
            f"base backup {plan.backup.name} begins at {format_lsn(label.start_lsn)} by its backup_label, but at "
            f"{format_lsn(plan.backup.start_lsn)} by its sentinel",
            hint="Use another backup.",
        )


async def _make_durable(top: Path, concurrency: int) -> None:
    """Make everything below `top` durable, files before the directories that name them."""
    files, directories = await in_thread(_contents, top)
    async with task_group() as group:
        for share in (files[start::concurrency] for start in range(concurrency)):
            group.create_task(in_thread(_fsync_files, share), name="fsync")
    await in_thread(_fsync_directories, directories)


def _contents(top: Path) -> tuple[list[Path], list[Path]]:
    """Return the files and the directories below `top`, which is itself the last; links are not followed."""
    files: list[Path] = []
    directories: list[Path] = []
    for directory, _, names in os.walk(top, topdown=False):
        directories.append(Path(directory))
        files.extend(Path(directory, name) for name in names)
    return files, directories


def _fsync_files(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync_directories(paths: Iterable[Path]) -> None:
    for path in paths:
        fsync_directory(path)
