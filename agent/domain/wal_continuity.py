"""Which WAL segments the repository must hold by now, and which of them are missing.

PostgreSQL looks at `archive_status` alone. What it believes archived may not be: a failover leaves out what the old
primary had not archived, and anybody can mark a file `.done`. History says what must be there: every finished segment
on the way to the server's timeline, from the first that a kept base backup needs.

Segments are counted by number, start LSN divided by segment size, in `range`s: an archive may hold millions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from agent.domain.catalog import Backup
from agent.domain.timeline import Stretch, history_name
from agent.domain.wal import segment_position
from agent.domain.wal_runs import lacking, merged, name_on_path, ranges_by_timeline, ranges_on_path


@dataclass(frozen=True, slots=True)
class ServerWal:
    """What a primary's own files say about its WAL.

    path: the way to its timeline.
    end: number of the first segment on it that PostgreSQL has not finished yet, as far as archive_status tells.
    pending: names that PostgreSQL has marked ready: it will still ask for them.
    segment_bytes: `wal_segment_size`.
    """

    path: tuple[Stretch, ...]
    end: int
    pending: frozenset[str]
    segment_bytes: int

    @property
    def timeline(self) -> int:
        """The timeline that is being written."""
        return self.path[-1].timeline

    def segment(self, number: int) -> str:
        """Name the segment `number` of this path."""
        return name_on_path(self.path, number, self.segment_bytes)


@dataclass(frozen=True, slots=True)
class Gap:
    """Consecutive segments that are finished and not archived: their numbers, and names of the first and the last."""

    numbers: range
    first: str
    last: str


def finished_end(path: Sequence[Stretch], marked: Collection[str], segment_bytes: int) -> int | None:
    """Return the number of the first segment on `path` that is not finished, or None if that cannot be told.

    Args:
        path: The way to the server's timeline.
        marked: Names of the WAL files that have an archive status, `.ready` or `.done`.
        segment_bytes: `wal_segment_size`.

    A server that has marked nothing of its own timeline does not archive it, or has not finished anything yet: a
    restored one, say, that must not archive. Segments are marked in order, when they are finished.
    Source: XLogWrite() in PostgreSQL's src/backend/access/transam/xlog.c.
    """
    own = path[-1]
    positions = (segment_position(name, segment_bytes) for name in marked)
    numbers = [position[1] for position in positions if position is not None and position[0] == own.timeline]
    if not numbers and history_name(own.timeline) not in marked:
        return None
    return max([number + 1 for number in numbers], default=own.from_lsn // segment_bytes)


def find_gaps(
    server: ServerWal, backups: Sequence[Backup], held: Mapping[int, Sequence[range]], proven: int = 0
) -> tuple[Gap, ...]:
    """Return what must be archived by now and is not, in order.

    Args:
        server: The server's own view.
        backups: The catalog.
        held: For each timeline the numbers of its archived segments.
        proven: Segments with a lower number were seen to be there earlier: they may be left out of `held`.

    Never missed: what PostgreSQL will still ask for; WAL from before the oldest base backup, or, without one, before
    the oldest archived segment; WAL between permanent base backups, of which expiry keeps only what makes them
    consistent; what happened on a timeline after it was left.
    """
    size = server.segment_bytes
    on_path = merged(ranges_on_path(server.path, held, size))
    there = merged(
        [range(proven), *on_path, *ranges_on_path(server.path, ranges_by_timeline(server.pending, size), size)]
    )
    return tuple(
        Gap(numbers, server.segment(numbers.start), server.segment(numbers.stop - 1))
        for wanted in _wanted(server, backups, on_path)
        for numbers in lacking(wanted, there)
    )


def needs_backup(gap: Gap, server: ServerWal, backups: Sequence[Backup]) -> bool:
    """Tell whether no base backup on the server's path begins after `gap`: nothing later can be restored."""
    return not any(
        backup.start_lsn // server.segment_bytes >= gap.numbers.stop for backup in _backups_on_path(server, backups)
    )


def first_wanted(server: ServerWal, backups: Sequence[Backup]) -> int | None:
    """Return the number of the first segment that a base backup on the server's path needs, None without one."""
    starts = [backup.start_lsn // server.segment_bytes for backup in _backups_on_path(server, backups)]
    return min(starts, default=None)


def _backups_on_path(server: ServerWal, backups: Sequence[Backup]) -> list[Backup]:
    ends = {stretch.timeline: stretch.to_lsn for stretch in server.path}
    return [
        backup
        for backup in backups
        if backup.timeline in ends and ((end := ends[backup.timeline]) is None or backup.finish_lsn <= end)
    ]


def _wanted(server: ServerWal, backups: Sequence[Backup], on_path: Sequence[range]) -> list[range]:
    size = server.segment_bytes
    kept = _backups_on_path(server, backups)
    expiring = [backup.start_lsn for backup in kept if not backup.permanent]
    if expiring:
        begin = min(expiring) // size
    elif kept:
        begin = max(backup.start_lsn for backup in kept) // size
    elif on_path:
        begin = on_path[0].start
    else:
        return []
    permanent = [range(backup.start_lsn // size, -(-backup.finish_lsn // size)) for backup in kept if backup.permanent]
    finished = [range(each.start, min(each.stop, server.end)) for each in [*permanent, range(begin, server.end)]]
    return merged(finished)
