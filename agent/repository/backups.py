"""Base backups as a repository shows them: the catalog, and what each one's JSON objects say.

A base backup exists if its sentinel does. Its times and permanence are those of `metadata.json`, as for WAL-G.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from agent.domain.catalog import Backup, begins_in
from agent.domain.lsn import format_lsn
from agent.domain.wal import SEGMENT_SIZES
from agent.errors import RepositoryCorrupt
from agent.ports import ObjectInfo, ObjectStore
from agent.repository.documents import Document, read_document
from agent.repository.keys import (
    BACKUP_FOLDER,
    backup_name_of_sentinel,
    metadata_key,
    sentinel_key,
    tar_folder,
)
from agent.repository.parent_files import file_flags
from agent.tasks import task_group

CORRUPT_PAGES = "PitrCorruptPages"
"""Of the sentinel, where WAL-G ignores what it does not know; its own count is by file, in `files_metadata.json`."""
LIBC = "PitrLibc"
"""Of the sentinel: version of the C library that the server sorted text by."""
CONFIG_OUTSIDE = "PitrConfigOutside"
"""Of the sentinel: paths of the server's configuration files that are not in the base backup."""

_PARALLEL_READS = 8
_MAX_METADATA_BYTES = 4 << 20
_MAX_SENTINEL_BYTES = 64 << 20  # those of WAL-G 1.0 list the files themselves

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DeltaOrigin:
    """What a delta builds on: its parent's name and start LSN, the root full backup's name, steps since that one."""

    parent: str
    parent_lsn: int
    full: str
    count: int


@dataclass(frozen=True, slots=True)
class FileDescription:
    """One member of a backup's tars.

    is_incremented: the member is an increment of the parent's file; is_skipped: it is unchanged and only in the parent.
    """

    is_incremented: bool
    is_skipped: bool


@dataclass(frozen=True, slots=True)
class FilesMetadata:
    """What the tars of a backup hold.

    files: by tar member name, directories too; empty if nothing is known, then every member counts.
    tar_file_sets: member names by tar object name; not complete in every repository.
    """

    files: Mapping[str, FileDescription]
    tar_file_sets: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Sentinel:
    """What a sentinel says. None, False or empty where it says nothing.

    `data_directory` is where tablespace links belong: the data directory that was backed up (Spec's base_prefix, else
    DataDir). `tablespaces`: OID of those outside it, to the directory it was in. `embedded_files` is the list of files
    that WAL-G up to 1.0 kept in the sentinel.
    """

    name: str
    start_lsn: int | None
    finish_lsn: int | None
    pg_version: int
    system_identifier: int | None
    size_bytes: int
    stored_bytes: int
    start_time: datetime | None
    finish_time: datetime | None
    data_directory: str | None
    tablespaces: Mapping[int, str]
    delta: DeltaOrigin | None
    permanent: bool
    files_metadata_disabled: bool
    embedded_files: FilesMetadata | None
    catalog_bytes: int = 0
    corrupt_pages: int | None = None
    libc: str | None = None
    config_outside: tuple[str, ...] = ()


async def read_catalog(
    store: ObjectStore, *, strict: bool = False, damaged: dict[str, RepositoryCorrupt] | None = None
) -> list[Backup]:
    """Return every base backup, oldest first (by finish time, then by the sentinel's age).

    Sentinels of foreign names are no base backups and are ignored. A damaged backup is passed over with a warning, so
    that the others serve, unless `strict`: for callers to whom an overlooked one would matter.

    Raises:
        RepositoryCorrupt: `strict`, and a sentinel or `metadata.json` cannot be understood; the message names it.
        RepositoryError: The repository could not be read.
    """
    limit = asyncio.Semaphore(_PARALLEL_READS)

    async def read(name: str, info: ObjectInfo) -> Backup | None:
        async with limit:
            if damaged is None:
                return await (_read_backup if strict else _read_if_sound)(store, name, info)
            try:
                return await _read_backup(store, name, info)
            except RepositoryCorrupt as error:
                damaged[name] = error
                return None

    async with task_group() as group:
        tasks = [group.create_task(read(name, info), name=f"read {name}") for name, info in await _sentinels(store)]
    found = [backup for task in tasks if (backup := task.result()) is not None]
    return sorted(_with_corrupt_pages(found), key=lambda backup: (backup.finish_time, backup.modified_at))


def _with_corrupt_pages(backups: Sequence[Backup]) -> Iterator[Backup]:
    """Yield `backups`; a delta that does not count its corrupt pages, as WAL-G's, with as many as its parent has.

    What was damaged there and has not changed since, such a delta does not store.
    """
    by_name = {backup.name: backup for backup in backups}
    for backup in backups:
        counted = backup
        for _ in backups:  # no chain is longer, but one may be made to have no end
            if counted.counts_corrupt_pages or counted.parent not in by_name:
                break
            counted = by_name[counted.parent]
        yield replace(backup, corrupt_pages=counted.corrupt_pages)


async def _sentinels(store: ObjectStore) -> list[tuple[str, ObjectInfo]]:
    named = [(backup_name_of_sentinel(info.key), info) async for info in store.list_folder(BACKUP_FOLDER)]
    return [(name, info) for name, info in named if name is not None]


async def read_backup(store: ObjectStore, name: str) -> Backup | None:
    """Return the base backup `name`, or None if there is none.

    Raises:
        RepositoryCorrupt: Its sentinel or `metadata.json` cannot be understood.
        RepositoryError: The repository could not be read.
    """
    info = await store.head(sentinel_key(name))
    return None if info is None else await _read_backup(store, name, info)


async def _read_if_sound(store: ObjectStore, name: str, info: ObjectInfo) -> Backup | None:
    try:
        return await _read_backup(store, name, info)
    except RepositoryCorrupt as error:
        log.warning("base backup cannot be understood", backup=name, reason=error.one_line())
        return None


async def _read_backup(store: ObjectStore, name: str, info: ObjectInfo) -> Backup | None:
    document = await read_document(store, info.key, _MAX_SENTINEL_BYTES)
    if document is None:  # expired since it was listed
        return None
    sentinel = _parse_sentinel(name, document)
    metadata = await read_document(store, metadata_key(name), _MAX_METADATA_BYTES)
    return _combine(sentinel, metadata or Document(metadata_key(name), {}), info)


def _combine(sentinel: Sentinel, metadata: Document, info: ObjectInfo) -> Backup:
    start_lsn, finish_lsn = sentinel.start_lsn, sentinel.finish_lsn
    if start_lsn is None:
        start_lsn = metadata.whole("start_lsn")
    if finish_lsn is None:
        finish_lsn = metadata.whole("finish_lsn")
    if start_lsn is None or finish_lsn is None:
        raise RepositoryCorrupt(f"{info.key} says neither LSN nor FinishLSN, and {metadata.key} does not either")
    _require_fitting_name(sentinel.name, start_lsn, info.key)
    system_identifier = sentinel.system_identifier
    if system_identifier is None:
        system_identifier = metadata.whole("system_identifier")
    delta = sentinel.delta
    return Backup(
        name=sentinel.name,
        timeline=int(sentinel.name[5:13], 16),
        start_lsn=start_lsn,
        finish_lsn=finish_lsn,
        start_time=metadata.moment("start_time") or sentinel.start_time or info.modified_at,
        finish_time=metadata.moment("finish_time") or sentinel.finish_time or info.modified_at,
        modified_at=info.modified_at,
        pg_version=sentinel.pg_version,
        system_identifier=system_identifier,
        size_bytes=sentinel.size_bytes,
        stored_bytes=sentinel.stored_bytes,
        permanent=metadata.flag("is_permanent"),
        parent=delta.parent if delta else None,
        full=delta.full if delta else None,
        delta_count=delta.count if delta else 0,
        catalog_bytes=sentinel.catalog_bytes,
        corrupt_pages=sentinel.corrupt_pages or 0,
        counts_corrupt_pages=sentinel.corrupt_pages is not None,
        libc=sentinel.libc,
        config_outside=sentinel.config_outside,
    )


def _require_fitting_name(name: str, start_lsn: int, key: str) -> None:
    """Raise unless the name fits `start_lsn` with some legal size of segments.

    A renamed backup would be restored with the WAL of another one.
    """
    if not any(begins_in(name[5:29], start_lsn, size) for size in SEGMENT_SIZES):
        raise RepositoryCorrupt(f"{key}: its name does not fit its start LSN {format_lsn(start_lsn)}")


async def read_sentinel(store: ObjectStore, name: str) -> Sentinel:
    """Return what the sentinel of the base backup `name` says.

    Raises:
        RepositoryCorrupt: It is absent, or cannot be understood.
        RepositoryError: It could not be read.
    """
    document = await read_document(store, sentinel_key(name), _MAX_SENTINEL_BYTES)
    if document is None:
        raise RepositoryCorrupt(f"base backup {name} has no sentinel: it is incomplete, or was deleted")
    return _parse_sentinel(name, document)


def _parse_sentinel(name: str, document: Document) -> Sentinel:
    spec = document.object("Spec") or document.object("spec")  # WAL-E wrote it in lower case
    return Sentinel(
        name=name,
        start_lsn=document.whole("LSN"),
        finish_lsn=document.whole("FinishLSN"),
        pg_version=document.whole("PgVersion") or 0,
        system_identifier=document.whole("SystemIdentifier"),
        size_bytes=document.whole("UncompressedSize") or 0,
        stored_bytes=document.whole("CompressedSize") or 0,
        start_time=document.moment("StartTime"),
        finish_time=document.moment("FinishTime"),
        data_directory=(spec.text("base_prefix") if spec else None) or document.text("DataDir"),
        tablespaces=_parse_tablespaces(spec) if spec else {},
        delta=_parse_delta(document),
        permanent=document.flag("IsPermanent"),
        files_metadata_disabled=document.flag("FilesMetadataDisabled"),
        embedded_files=_parse_files_metadata(document) if document.value("Files") else None,
        catalog_bytes=document.whole("DataCatalogSize") or 0,
        corrupt_pages=document.whole(CORRUPT_PAGES),
        libc=document.text(LIBC),
        config_outside=tuple(document.texts(CONFIG_OUTSIDE)),
    )


def _parse_delta(document: Document) -> DeltaOrigin | None:
    parent = document.text("DeltaFrom")
    if not parent:
        return None
    lsn, full = document.whole("DeltaLSN"), document.text("DeltaFullName")
    count = document.whole("DeltaCount")
    if lsn is None:
        lsn = document.whole("DeltaFromLSN")  # its name in WAL-G up to 1.0
    if lsn is None or not full or not count:
        raise document.corrupt("it has DeltaFrom, but not all of DeltaLSN, DeltaFullName and DeltaCount")
    return DeltaOrigin(parent, lsn, full, count)


def _parse_tablespaces(spec: Document) -> dict[int, str]:
    result: dict[int, str] = {}
    for oid in spec.texts("tablespaces"):
        entry = spec.object(oid)
        location, link = (entry.text("loc"), entry.text("link")) if entry else (None, None)
        if not oid.isdecimal() or location is None or not location.startswith("/") or link != f"pg_tblspc/{oid}":
            raise spec.corrupt(f"its Spec does not say where the tablespace {oid[:20]} is")
        result[int(oid)] = location
    return result


def _parse_files_metadata(document: Document) -> FilesMetadata:
    files, sets = document.object("Files"), document.object("TarFileSets")
    flags = {name: file_flags(document.key, name, files.value(name)) for name in files.names()} if files else {}
    return FilesMetadata(
        files={name: FileDescription(*each) for name, each in flags.items()},
        tar_file_sets={name: sets.texts(name) for name in sets.names()} if sets else {},
    )


async def list_tars(store: ObjectStore, name: str) -> list[ObjectInfo]:
    """Return the tar objects of the base backup `name`: every object in its tar folder, in key order."""
    return [info async for info in store.list_folder(tar_folder(name))]


async def owner_by_backups(store: ObjectStore) -> int | None:
    """Return the system identifier of the database cluster that the newest base backup is of, None if none says.

    A damaged backup is passed over with a warning: it must not keep the next, good one from being taken.

    Raises:
        RepositoryError: The repository could not be read.
    """
    newest_first = sorted(await _sentinels(store), key=lambda item: item[1].modified_at, reverse=True)
    for name, info in newest_first:
        backup = await _read_if_sound(store, name, info)
        if backup is not None and backup.system_identifier is not None:
            return backup.system_identifier
    return None
