"""Which archived WAL segments lead along a path of timelines, and where one is missing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from agent.domain.timeline import Stretch
from agent.domain.wal import segment_name


@dataclass(frozen=True, slots=True)
class Hole:
    """Segments that are missing although WAL after them is archived: names of the first and the last.

    `is_damage`: they are there, but their WAL ends before they do.
    """

    first: str
    last: str
    is_damage: bool = False

    def __str__(self) -> str:
        problem = "damaged" if self.is_damage else "missing"
        if self.first == self.last:
            return f"WAL segment {self.first} is {problem}"
        return f"WAL segments {self.first} to {self.last} are {problem}"


@dataclass(frozen=True, slots=True)
class WalRun:
    """Archived WAL without a gap: segments that follow each other on a path.

    start_lsn is where the first segment begins. `hole` is what is missing after the last one, None if the archived WAL
    of the path ends there.
    """

    start_lsn: int
    segment_bytes: int
    segments: tuple[str, ...]
    hole: Hole | None

    @property
    def end_lsn(self) -> int:
        """Where the last segment ends."""
        return self.start_lsn + len(self.segments) * self.segment_bytes

    def index(self, lsn: int) -> int:
        """Return which segment, from 0, holds the byte at `lsn`."""
        return (lsn - self.start_lsn) // self.segment_bytes

    def holds(self, start_lsn: int, stop_lsn: int) -> bool:
        """Tell whether all bytes from `start_lsn` up to, not including, `stop_lsn` are in this run."""
        return self.start_lsn <= start_lsn and stop_lsn <= self.end_lsn

    def segments_to(self, stop_lsn: int) -> tuple[str, ...]:
        """Return the segments that hold bytes before `stop_lsn`."""
        return self.segments[: self.index(stop_lsn - 1) + 1]

    def from_index(self, index: int) -> "WalRun":
        """Return this run without its first `index` segments."""
        return replace(self, start_lsn=self.start_lsn + index * self.segment_bytes, segments=self.segments[index:])

    def broken_at(self, index: int) -> "WalRun":
        """Return this run up to and including segment `index`, which is damaged."""
        name = self.segments[index]
        return replace(self, segments=self.segments[: index + 1], hole=Hole(name, name, is_damage=True))


def wal_runs(path: Sequence[Stretch], present: Mapping[int, Collection[int]], segment_bytes: int) -> tuple[WalRun, ...]:
    """Group the archived segments on `path` into runs without a gap, in order.

    A segment in which a timeline was left counts only as the later timeline's copy, which begins with the same bytes:
    it is what PostgreSQL asks for first, and the earlier timeline's may go on after the fork with what happened there.

    Args:
        path: The way to a timeline's end, see `path_to`.
        present: For each timeline the numbers (start LSN by segment size) of its archived segments.
        segment_bytes: `wal_segment_size`.

    Source: XLogFileReadAnyTLI() in PostgreSQL's src/backend/access/transam/xlogrecovery.c.
    """
    names: dict[int, str] = {}
    for stretch in path:
        for number in present.get(stretch.timeline, ()):
            last_byte = (number + 1) * segment_bytes - 1
            if stretch.from_lsn <= last_byte and (stretch.to_lsn is None or last_byte < stretch.to_lsn):
                names[number] = segment_name(stretch.timeline, number * segment_bytes, segment_bytes)
    numbers = sorted(names)
    starts = [i for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number - 1]
    groups = [numbers[start:stop] for start, stop in pairwise([*starts, len(numbers)])]
    following = [group[0] for group in groups[1:]]
    return tuple(
        WalRun(
            group[0] * segment_bytes,
            segment_bytes,
            tuple(names[number] for number in group),
            _hole_after(group[-1], int(names[group[-1]][:8], 16), following_number, path, present, segment_bytes),
        )
        for group, following_number in zip_longest(groups, following)
    )


def name_on_path(path: Sequence[Stretch], number: int, segment_bytes: int) -> str:
    """Name the segment `number` (start LSN by segment size) that belongs to `path`, see `wal_runs`."""
    last_byte = (number + 1) * segment_bytes - 1
    stretch = next(s for s in path if s.to_lsn is None or last_byte < s.to_lsn)
    return segment_name(stretch.timeline, number * segment_bytes, segment_bytes)


def _hole_after(
    last: int,
    timeline: int,
    following: int | None,
    path: Sequence[Stretch],
    present: Mapping[int, Collection[int]],
    segment_bytes: int,
) -> Hole | None:
    next_name = name_on_path(path, last + 1, segment_bytes)
    if following is not None:
        return Hole(next_name, name_on_path(path, following - 1, segment_bytes))
    # PostgreSQL would go on with a timeline that the path has left (not with one older than what it last read), and
    # replay what happened there.
    has_stray = any(stretch.timeline >= timeline and last + 1 in present.get(stretch.timeline, ()) for stretch in path)
    return Hole(next_name, next_name) if has_stray else None
