"""The WAL that a base backup cannot do without, and waiting until it is archived."""

from collections.abc import Callable, Collection

from agent.domain.backup_label import backup_history_name
from agent.domain.timeline import history_name
from agent.domain.wal import WalFileKind, segments_between, wal_file_kind
from agent.errors import BackupFailed
from agent.ports import Clock, ObjectStore
from agent.repository.keys import WAL_FOLDER
from agent.repository.wal_archive import parse_wal_object

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 5.0


def needed_wal_files(
    timeline: int, start_lsn: int, stop_lsn: int, segment_bytes: int, *, has_history: bool, on_standby: bool = False
) -> list[str]:
    """Name the WAL files that make a base backup consistent: its segments, and its backup history file.

    has_history: the server has a history file of its timeline. It belongs to them: with archiving off at promotion
    PostgreSQL never archives it by itself, and the way from an older base backup to this timeline is lost.

    on_standby: it was taken of a standby, which writes no backup history file.

    PostgreSQL's own wait for them is not enough: it looks at archive_status, where anybody may have marked a file as
    archived, and it does not wait at all with archive_mode off.
    """
    segments = segments_between(timeline, start_lsn, stop_lsn, segment_bytes)
    names = segments if on_standby else [*segments, backup_history_name(segments[0], start_lsn, segment_bytes)]
    return [history_name(timeline), *names] if has_history else names


async def wait_until_archived(
    store: ObjectStore, names: Collection[str], seconds: float, clock: Clock, report: Callable[[int], None]
) -> None:
    """Return when the repository has been seen to hold every WAL file in `names`; `report` is told how many it holds.

    Raises:
        BackupFailed: One is missing after `seconds`.
        RepositoryError: The repository could not be listed.
    """
    missing, deadline, pause = set(names), clock.monotonic() + seconds, _FIRST_PAUSE_SECONDS
    while missing := missing - await _archived(store, missing):
        report(len(names) - len(missing))
        if clock.monotonic() >= deadline:
            raise BackupFailed(
                f"{len(missing)} of the {len(names)} WAL files that the base backup needs are not archived after "
                f"{seconds:g} s; the first is {min(missing)}",
                hint="See pg_stat_archiver and the server's log for why archiving fails.",
            )
        await clock.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    report(len(names))


async def _archived(store: ObjectStore, wanted: Collection[str]) -> set[str]:
    # Between a timeline's history file and what is archived now there may be very many segments.
    histories = {name for name in wanted if wal_file_kind(name) is WalFileKind.HISTORY}
    ranges = [sorted(group) for group in (histories, set(wanted) - histories) if group]
    return {name for names in ranges for name in await _listed(store, names[0], names[-1])}


async def _listed(store: ObjectStore, first: str, last: str) -> set[str]:
    found: set[str] = set()
    # `after` is exclusive, and an uncompressed object is called just like its WAL file: begin a little earlier.
    async for info in store.list(WAL_FOLDER, after=WAL_FOLDER + first[:-1]):
        item = parse_wal_object(info)
        if item is not None:
            if item.name[:24] > last[:24]:  # keys sort a backup history file before its segment, names after it
                break
            found.add(item.name)
    return found
