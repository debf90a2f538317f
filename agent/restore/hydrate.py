"""Fills a data directory from base backups.

Two steps, so that recovery settings are in place before PostgreSQL can start:

    claim(directory) -> [marker] -> hydrate(...) -> [recovery settings, signal file] -> finish(directory)

A call that was killed is repeated: what it completed is not downloaded again (`agent.restore.parts_done`).

Invariants:
    Only a directory that is empty, or that carries our marker and no `global/pg_control`, is written to.
    Until `finish` there is no `global/pg_control`: PostgreSQL cannot start on half a database.
    Every file that the backup lists has arrived, once, and what was written is durable, when `hydrate` returns.
    Nothing is written outside the data directory and the directories of its tablespaces, whatever the tars say.

The marker is the caller's (`agent.restore.marker`), as is keeping others out of the directory.
"""

import asyncio
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import google_crc32c
import structlog

from agent.budget import MemoryBudget, give_back
from agent.domain.backup_label import parse_backup_label
from agent.domain.control_file import parse_control_file
from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import format_time
from agent.errors import ConfigError, RepositoryCorrupt, RestoreFailed
from agent.ports import ObjectStore
from agent.postgres.durable import Durability, fsync_directory
from agent.repository.backup_manifest import MANIFEST_FILE
from agent.repository.backups import list_tars, read_sentinel
from agent.repository.file_names import FileNames
from agent.repository.object_format import ObjectFormat
from agent.restore.chain import Hydration, Source
from agent.restore.existing import Sweep, directories_below
from agent.restore.manifest import load_manifest, place_manifest
from agent.restore.marker import MARKER_NAME, NOBODYS
from agent.restore.parts_done import PartRecord, PartsDone
from agent.restore.tablespaces import (
    make_tablespaces,
    release_tablespaces,
    remove_tree,
    tablespace_directories,
    write_tablespace_map,
)
from agent.restore.unpacker import UNFINISHED_CONTROL_FILE, Building
from agent.restore.wanted import CONTROL_FILE, LABEL_FILE, read_wanted_files
from agent.tasks import in_thread, task_group
from agent.telemetry.progress import ReportProgress

log = structlog.get_logger()

EMPTY_HINT = (
    "Restore into an empty directory; or, over the data directory of the same database cluster, stop its server and "
    "set PITR_RESTORE_DELTA=true."
)
_MOUNTED = (
    "PGDATA names a directory: run the restore as the user that PostgreSQL runs as, with the volume mounted writable."
)

# What PostgreSQL needs to start, or to end a recovery, whether the backup stored it or not. Without pg_subtrans, for
# one, it replays everything, announces a new timeline, and dies.
_DIRECTORIES = (
    "base", "global", "pg_commit_ts", "pg_dynshmem", "pg_logical", "pg_logical/mappings", "pg_logical/snapshots",
    "pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "pg_notify", "pg_replslot", "pg_serial",
    "pg_snapshots", "pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase", "pg_wal",
    "pg_wal/archive_status", "pg_xact",
)  # fmt: skip


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
            hint=EMPTY_HINT,
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
    budget: MemoryBudget | None = None,
    keep_matching: bool = False,
    free_memory: Callable[[], None] = give_back,
) -> None:
    """Put all files of the plan's base backups into `data_directory`, `global/pg_control` under a temporary name.

    What an earlier, interrupted call has completed is not downloaded again, if it was about the same; everything else
    that lies there is removed first. Stale state (signal files, postmaster.pid, an earlier label) is left out. What is
    written is durable on return.

    Args:
        store: The repository.
        objects: How its tars are packed.
        plan: Which base backups.
        data_directory: A claimed directory, see `claim`, since then with a marker.
        tablespace_map: Directory that a tablespace was in, to the one it goes to; others go back to where they were.
        concurrency: Tar parts downloaded and unpacked at once.
        report: Is told the stored bytes of the base backups read so far, of all.
        budget: What the buffers are reserved from; None: without a limit.
        keep_matching: Keep files that are there with the size and CRC32C of the manifest; only others are written.
        free_memory: Called when all lists are read, which takes more than is kept of them, before the first tar is.

    Raises:
        ConfigError: The directory, or one of a tablespace, cannot be used, or the volumes have too few inodes.
        RepositoryError: An object cannot be read, is damaged, or a file that the backup lists has not arrived.
        OSError: The volume failed, or is full.
    """
    sentinels = [await read_sentinel(store, backup.name) for backup in plan.chain]
    wanted = await read_wanted_files(store, sentinels)
    sources = [
        Source(sentinel, files, await list_tars(store, sentinel.name))
        for sentinel, files in zip(sentinels, wanted.sources, strict=True)
    ]
    done = PartsDone(data_directory)
    directories = await in_thread(_prepare, done, sources, tablespace_map, keep_matching)
    spool = done.folder / MANIFEST_FILE
    manifest = await load_manifest(store, objects, plan.backup.name, spool)
    if keep_matching and manifest is None:
        log.warning("all files are written anew: the base backup has no manifest", backup_id=plan.backup.name)
    building = Building(data_directory, wanted, manifest)
    records = await in_thread(_read_records, done, sources)
    await _sweep(building, records, plan.backup.pg_version, by_content=keep_matching, concurrency=concurrency)
    await in_thread(free_memory)
    places = [data_directory, *directories.values()]
    await in_thread(_require_inodes, places, building, records.values(), plan.backup.name)
    await Hydration(store, objects, building, done, concurrency, budget, report).unpack(sources, records)
    await in_thread(_complete, data_directory)
    await in_thread(write_tablespace_map, directories, data_directory)
    if manifest is not None:
        await in_thread(place_manifest, spool, data_directory)
    await in_thread(_check_control_file, data_directory / UNFINISHED_CONTROL_FILE, plan)
    await in_thread(_check_label, data_directory / LABEL_FILE, plan)
    await in_thread(_make_directories_durable, places)


async def finish(data_directory: Path) -> None:
    """Put `global/pg_control` in its place: the last step, after which PostgreSQL can start. Durable on return.

    May be repeated after a crash.

    Raises:
        RestoreFailed: `hydrate` has not completed here.
        OSError: The volume failed.
    """
    unfinished = data_directory / UNFINISHED_CONTROL_FILE

    def put_in_place() -> None:
        if not (data_directory / CONTROL_FILE).exists():
            unfinished.rename(data_directory / CONTROL_FILE)
        fsync_directory(unfinished.parent)
        release_tablespaces(data_directory)
        PartsDone(data_directory).forget()

    try:
        await in_thread(put_in_place)
    except FileNotFoundError:
        raise RestoreFailed(
            f"{data_directory} is not hydrated: it has no {UNFINISHED_CONTROL_FILE}", hint="Run the restore again."
        ) from None


def _prepare(
    done: PartsDone, sources: Sequence[Source], tablespace_map: Mapping[str, str], keep_matching: bool
) -> dict[int, Path]:
    """Make what lies in the directory either what an earlier run of the same has left, or nothing.

    With `keep_matching` files stay until they are looked at. Returns the directories of the tablespaces.
    """
    data_directory = done.folder.parent
    directories = tablespace_directories(sources[-1].sentinel.tablespaces, tablespace_map, data_directory.absolute())
    names = {entry.name for entry in data_directory.iterdir()} - NOBODYS
    if names - {MARKER_NAME} and (MARKER_NAME not in names or (data_directory / CONTROL_FILE).exists()):
        raise ConfigError(
            f"{data_directory} is not empty, and not what an interrupted restore left",
            hint=EMPTY_HINT,
        )
    work = {
        "tars": [[tar.key, tar.size, format_time(tar.modified_at)] for source in sources for tar in source.tars],
        "tablespaces": {str(oid): str(directory) for oid, directory in directories.items()},
    }
    is_known = done.is_about(work)
    for name in names - {MARKER_NAME} if not (is_known or keep_matching) else ():
        remove_tree(data_directory / name)
    pg_version = sources[-1].sentinel.pg_version
    make_tablespaces(directories, data_directory.absolute(), pg_version, keep=is_known or keep_matching)
    if not is_known:
        done.begin(work)
    return directories


def _read_records(done: PartsDone, sources: Sequence[Source]) -> dict[str, PartRecord]:
    keys = [tar.key for source in sources for tar in source.parts()]
    return {key: record for key in keys if (record := done.read(key)) is not None}


async def _sweep(
    building: Building, records: Mapping[str, PartRecord], pg_version: int, *, by_content: bool, concurrency: int
) -> None:
    """Remove all that is neither recorded nor, `by_content`, what the manifest says."""
    arrived = FileNames(array("Q", (digest for record in records.values() for digest in record.arrived)))
    sweep = Sweep(building, arrived, pg_version, by_content=by_content)
    chunks, limit = sweep.chunks(), asyncio.Semaphore(concurrency)

    async def handle(chunk: list[tuple[str, Path]]) -> None:
        try:
            await in_thread(sweep.handle, chunk)
        finally:
            limit.release()

    async with task_group() as group:
        while (chunk := await in_thread(next, chunks, None)) is not None:
            await limit.acquire()
            group.create_task(handle(chunk), name="sweep")
    await in_thread(sweep.remove_empty_directories)


def _require_inodes(places: Iterable[Path], building: Building, records: Iterable[PartRecord], backup: str) -> None:
    """Return if the volumes of `places` together can hold as many files as are still to come, or do not tell."""
    volumes = {place.stat().st_dev: os.statvfs(place) for place in places}
    names = building.wanted.names
    if names is None or not all(volume.f_files for volume in volumes.values()):
        return
    needed = len(names) - sum(building.kept) - sum(len(record.arrived) for record in records)
    free = sum(volume.f_favail for volume in volumes.values())
    if free < needed:
        raise ConfigError(
            f"{building.data_directory} can take {free} more files, for its volume has no more inodes, but {backup} "
            f"needs {needed}",
            hint="Use a volume with more inodes: XFS, or ext4 made with a larger number of them.",
        )


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


def _make_directories_durable(tops: Iterable[Path]) -> None:
    """Make the names in all directories below `tops` durable, and the manifest; all other files are already."""
    with closing(Durability()) as written:
        for top in tops:
            for directory in directories_below(top):
                written.add_directory(directory)
        written.sync()
