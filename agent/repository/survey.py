"""What a repository holds, as retention needs to see it: from listings and the catalog, whatever their length.

The folders are listed before the catalog is read: a base backup that is completed meanwhile is in the catalog then, and
never taken for one without a sentinel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from agent.domain.catalog import Backup, begins_in, is_backup_name
from agent.domain.inventory import Inventory, TimelineWal
from agent.domain.retention import LEFTOVER_AGE
from agent.domain.wal import SEGMENT_SIZES, WalFileKind
from agent.domain.wal_runs import add_segment, merged
from agent.errors import ConfigError, RepositoryCorrupt
from agent.ports import Clock, ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.keys import BACKUP_FOLDER, WAL_FOLDER, backup_name_of_sentinel, tar_folder
from agent.repository.restore_lease import is_lease, leased
from agent.repository.wal_archive import WalArchive, parse_wal_object

CLOCK_TOLERANCE = timedelta(minutes=5)
_TRIES = 3  # segments that are read to learn their size, should they be damaged


@dataclass(slots=True)
class Folder:
    """What is stored of one base backup, its sentinel included. `newest_at`: when, but for leases of restores."""

    objects: int
    stored_bytes: int
    newest_at: datetime
    sentinel_bytes: int = 0
    tar_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """The rules' view of a repository, what is stored of each backup, and names of those that are left over.

    `leftovers` have no sentinel, and nothing was added to them for so long that nobody is taking them any more.
    """

    inventory: Inventory
    folders: Mapping[str, Folder]
    leftovers: Sequence[str]


@dataclass(slots=True)
class Damage:
    """What cannot be understood: base backups by name, and timeline histories."""

    backups: dict[str, RepositoryCorrupt] = field(default_factory=dict)
    histories: list[RepositoryCorrupt] = field(default_factory=list)


async def survey_repository(
    store: ObjectStore, archive: WalArchive, clock: Clock, *, damage: Damage | None = None
) -> Survey:
    """Look at the whole repository; `damage` collects what cannot be understood, which is then passed over.

    Raises:
        ConfigError: The clocks of this machine and of the store differ by minutes: no age can be told.
        RepositoryCorrupt: A base backup cannot be understood: what it needs cannot be told. Not with `damage`.
        RepositoryError: The repository could not be read.
    """
    now = await _agreed_time(store, clock)
    folders = await _folders(store)
    catalog = await read_catalog(store, strict=True, damaged=None if damage is None else damage.backups)
    missing = set(folders) - {backup.name for backup in catalog}
    leftovers = sorted(name for name in missing if folders[name].newest_at < now - LEFTOVER_AGE)
    segment_bytes = await _segment_bytes(archive, catalog)
    inventory = Inventory(
        now=now,
        backups=catalog,
        histories=await archive.histories(damaged=None if damage is None else damage.histories),
        wal=await _wal(store, segment_bytes),
        segment_bytes=segment_bytes,
        unfinished=sorted(missing - set(leftovers)),
        restoring=await leased(store, now),  # last: listing all WAL takes its time
    )
    return Survey(inventory, folders, leftovers)


async def _agreed_time(store: ObjectStore, clock: Clock) -> datetime:
    theirs, ours = await store.time(), clock.now()
    if abs(theirs - ours) > CLOCK_TOLERANCE:
        raise ConfigError(
            f"the store's clock says {theirs:%Y-%m-%d %H:%M:%S} UTC, this machine's {ours:%Y-%m-%d %H:%M:%S}",
            hint="Set the clock that is wrong: with it, backups would be taken for older than they are.",
        )
    return min(theirs, ours)


async def _folders(store: ObjectStore) -> dict[str, Folder]:
    folders: dict[str, Folder] = {}
    async for info in store.list(BACKUP_FOLDER):
        of_sentinel = backup_name_of_sentinel(info.key)
        name = of_sentinel or info.key.removeprefix(BACKUP_FOLDER).partition("/")[0]
        if not is_backup_name(name):
            continue
        folder = folders.setdefault(name, Folder(0, 0, info.modified_at))
        folder.objects += 1
        folder.stored_bytes += info.size
        folder.sentinel_bytes += info.size if of_sentinel else 0
        folder.tar_bytes += info.size if info.key.startswith(tar_folder(name)) else 0
        if not is_lease(info.key):
            folder.newest_at = max(folder.newest_at, info.modified_at)
    return folders


async def _segment_bytes(archive: WalArchive, catalog: Sequence[Backup]) -> int:
    """Return `wal_segment_size`: what fits the names of all base backups, or what a segment says."""
    sizes = [size for size in SEGMENT_SIZES if all(begins_in(b.start_segment, b.start_lsn, size) for b in catalog)]
    if catalog and not sizes:
        raise RepositoryCorrupt(
            "the base backups of this repository have different wal_segment_size",
            hint="It holds those of several database clusters: remove the old ones with pitr backup delete.",
        )
    if len(sizes) > 1:
        segments = [item for item in await archive.list_files() if item.kind is WalFileKind.SEGMENT]
        for item in reversed(segments):
            try:
                if (header := await archive.segment_header(item.name)) is not None:
                    return header.segment_bytes
            except RepositoryCorrupt:
                if item is segments[max(-_TRIES, -len(segments))]:
                    raise
    return sizes[0]


async def _wal(store: ObjectStore, segment_bytes: int) -> dict[int, TimelineWal]:
    held: dict[int, list[range]] = {}
    times: dict[int, tuple[datetime, datetime]] = {}
    async for info in store.list(WAL_FOLDER):
        if (item := parse_wal_object(info)) is None:
            continue
        timeline = int(item.name[:8], 16)
        first, last = times.get(timeline, (info.modified_at, info.modified_at))
        times[timeline] = (min(first, info.modified_at), max(last, info.modified_at))
        add_segment(held, item.name, segment_bytes)
    return {timeline: TimelineWal(merged(held.get(timeline, ())), *each) for timeline, each in times.items()}
