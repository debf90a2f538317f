"""Reads the transactions that ended near a moment out of the archived WAL: a few segments, found by their times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from agent.domain.archived_path import ArchivedPath
from agent.domain.catalog import Backup
from agent.domain.file_node import FileNode
from agent.domain.relation_names import Relation
from agent.domain.restore_plan import resolve_timeline
from agent.domain.restore_target import format_time
from agent.domain.transactions import EndedTransaction, TransactionReader
from agent.domain.wal_around import Around, Nearest, Span, last_time, segments_around
from agent.domain.wal_walk import WalWalk
from agent.errors import NoRestorePath, RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.object_format import ObjectFormat
from agent.repository.relation_sizes import relation_sizes
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import fetch_segment, list_wal
from agent.tasks import in_thread


@dataclass(frozen=True, slots=True)
class NearTransactions:
    """What was found.

    transactions: in the order of WAL; the marked ones, and those nearest to the moment.
    left_out: how many more ended in the stretch of time, in the WAL that was read.
    before, after: the nearest ones outside of it, None where there are none, or were not read.
    span: the WAL that was read. timeline: along which.
    names: of relation files, as far as that WAL tells.
    sizes: of what was dropped, in bytes, as of the newest base backup before; only what that tells.
    """

    around: Around
    timeline: int
    span: Span
    transactions: Sequence[EndedTransaction]
    left_out: int
    before: EndedTransaction | None
    after: EndedTransaction | None
    names: Callable[[FileNode], Relation | None]
    sizes: Mapping[FileNode, int]


async def read_around(
    store: ObjectStore,
    archive: WalArchive,
    objects: ObjectFormat,
    around: Around,
    timeline: str,
    *,
    limit: int,
    most_segments: int,
    report: Callable[[int, int], None],
) -> NearTransactions:
    """Return the transactions that ended in a stretch of time.

    Args:
        store: The repository.
        archive: Its WAL part.
        objects: How its objects are packed.
        around: The moment and the stretch.
        timeline: Along which: `latest`, `current` or a number.
        limit: How many transactions to return.
        most_segments: How many segments to read.
        report: Told how many segments have been read, and of how many.

    Raises:
        NoRestorePath: The archived WAL does not show that time; the message says which it shows.
        RepositoryError: The repository could not be read, or is damaged.
    """
    catalog = await read_catalog(store)
    wal = await list_wal(archive, catalog)
    if not wal.stored_bytes:
        raise NoRestorePath(
            "the repository holds no WAL",
            hint="Is it the right WALG_S3_PREFIX? If it is: `pitr check` follows a segment into it.",
        )
    if not catalog:
        raise NoRestorePath("the repository holds no base backup", hint="`pitr backup now` takes one.")
    number = resolve_timeline(wal.held, timeline, catalog)
    path = ArchivedPath(wal.held, number)
    span = await wal.index.follow(segments_around(path, around, most_segments))
    if span is None:
        last = await wal.index.follow(last_time(path))
        seen = "none is" if last is None else f"the last one on the way to timeline {number} ended {format_time(last)}"
        raise NoRestorePath(
            f"no transaction that ended at {format_time(around.begin)} or later is archived: {seen}",
            hint="If the server runs, SELECT pg_switch_wal() has it archive what it wrote last; then ask again.",
            nearest_before=last,
        )
    system_identifier = catalog[-1].system_identifier
    walk, nearest, reader = WalWalk(), Nearest(around, limit), None
    for done, name in enumerate(span.names):
        report(done, len(span.names))
        content = await fetch_segment(archive, name, system_identifier)
        try:
            reader = await in_thread(_read, walk, reader, nearest, content)
        except ValueError as error:
            raise RepositoryCorrupt(f'"{name}" in the repository is damaged: {error}') from error
    assert reader is not None
    kept = nearest.kept()
    sizes = await _sizes(store, objects, [backup for backup in catalog if path.serves(backup)], kept)
    found = NearTransactions(
        around, number, span, kept, nearest.left_out, nearest.before, nearest.after, reader.names.get, sizes
    )
    _require_shown(found)
    return found


async def _sizes(
    store: ObjectStore, objects: ObjectFormat, backups: Sequence[Backup], transactions: Sequence[EndedTransaction]
) -> Mapping[FileNode, int]:
    dropping = [each for each in transactions if each.marks and each.dropped]
    before = [backup for backup in backups if dropping and backup.finish_lsn <= dropping[0].lsn]
    if not before:
        return {}
    newest = max(before, key=lambda backup: backup.finish_lsn)
    files = {file for each in dropping for file in each.dropped}
    return await relation_sizes(store, objects, newest.name, files) or {}


def _read(walk: WalWalk, reader: TransactionReader | None, nearest: Nearest, content: bytes) -> TransactionReader:
    for lsn, data in walk.take(content):
        reader = reader or TransactionReader(walk.magic)
        ended = reader.take(lsn, data)
        if ended is not None:
            nearest.add(ended)
    return reader or TransactionReader(walk.magic)


def _require_shown(found: NearTransactions) -> None:
    if found.transactions or found.before is not None or found.after is None:
        return
    hole = found.span.hole_before
    why = f"{hole}" if hole else "the archive begins later"
    raise NoRestorePath(
        f"{why}: the first transaction that it shows ended at {format_time(found.after.time)}",
        hint="Look around a later time; pitr window shows what can be restored.",
        nearest_after=found.after.time,
    )
