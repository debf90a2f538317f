"""Which archived WAL segments lead along a path of timelines, and where one is missing.

Segments are counted by number, start LSN divided by segment size, in `range`s: an archive may hold millions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import overload

from agent.domain.timeline import Stretch
from agent.domain.wal import segment_name, segment_position


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
class SegmentNames(Sequence[str]):
    """The names of consecutive segments on a path, made when they are asked for."""

    path: tuple[Stretch, ...]
    numbers: range
    segment_bytes: int

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "SegmentNames": ...
    def __getitem__(self, index: int | slice) -> "str | SegmentNames":
        if isinstance(index, slice):
            return replace(self, numbers=self.numbers[index])
        return name_on_path(self.path, self.numbers[index], self.segment_bytes)


@dataclass(frozen=True, slots=True)
class WalRun:
    """Archived WAL without a gap: segments that follow each other on a path.

    `hole` is what is missing after the last one, None if the archived WAL of the path ends there.
    """

    segments: SegmentNames
    hole: Hole | None

    @property
    def segment_bytes(self) -> int:
        """`wal_segment_size`."""
        return self.segments.segment_bytes

    @property
    def start_lsn(self) -> int:
        """Where the first segment begins."""
        return self.segments.numbers.start * self.segment_bytes

    @property
    def end_lsn(self) -> int:
        """Where the last segment ends."""
        return self.segments.numbers.stop * self.segment_bytes

    def index(self, lsn: int) -> int:
        """Return which segment, from 0, holds the byte at `lsn`."""
        return (lsn - self.start_lsn) // self.segment_bytes

    def holds(self, start_lsn: int, stop_lsn: int) -> bool:
        """Tell whether all bytes from `start_lsn` up to, not including, `stop_lsn` are in this run."""
        return self.start_lsn <= start_lsn and stop_lsn <= self.end_lsn

    def segments_to(self, stop_lsn: int) -> SegmentNames:
        """Return the segments that hold bytes before `stop_lsn`."""
        return self.segments[: self.index(stop_lsn - 1) + 1]

    def from_index(self, index: int) -> "WalRun":
        """Return this run without its first `index` segments."""
        return replace(self, segments=self.segments[index:])

    def broken_at(self, index: int) -> "WalRun":
        """Return this run up to and including segment `index`, which is damaged."""
        name = self.segments[index]
        return WalRun(self.segments[: index + 1], Hole(name, name, is_damage=True))


def wal_runs(path: Sequence[Stretch], present: Mapping[int, Sequence[range]], segment_bytes: int) -> tuple[WalRun, ...]:
    """Group the archived segments on `path` into runs without a gap, in order.

    A segment in which a timeline was left counts only as the later timeline's copy, which begins with the same bytes:
    it is what PostgreSQL asks for first, and the earlier timeline's may go on after the fork with what happened there.

    Args:
        path: The way to a timeline's end, see `path_to`.
        present: For each timeline the numbers of its archived segments.
        segment_bytes: `wal_segment_size`.

    Source: XLogFileReadAnyTLI() in PostgreSQL's src/backend/access/transam/xlogrecovery.c.
    """
    way = tuple(path)
    groups = merged(ranges_on_path(way, present, segment_bytes))
    return tuple(
        WalRun(
            SegmentNames(way, group, segment_bytes),
            _hole_after(group.stop, None if following is None else following.start, way, present, segment_bytes),
        )
        for group, following in zip_longest(groups, groups[1:])
    )


def ranges_on_path(
    path: Sequence[Stretch], present: Mapping[int, Sequence[range]], segment_bytes: int
) -> Iterator[range]:
    """Yield those of `present` that recovery would read, see `wal_runs`: of a segment with a fork the later copy."""
    for stretch in path:
        for each in present.get(stretch.timeline, ()):
            first = stretch.from_lsn // segment_bytes
            stop = each.stop if stretch.to_lsn is None else min(each.stop, stretch.to_lsn // segment_bytes)
            yield range(max(each.start, first), stop)


def name_on_path(path: Sequence[Stretch], number: int, segment_bytes: int) -> str:
    """Name the segment `number` (start LSN by segment size) that belongs to `path`, see `wal_runs`."""
    last_byte = (number + 1) * segment_bytes - 1
    stretch = next(s for s in path if s.to_lsn is None or last_byte < s.to_lsn)
    return segment_name(stretch.timeline, number * segment_bytes, segment_bytes)


def ranges_by_timeline(names: Iterable[str], segment_bytes: int) -> dict[int, list[range]]:
    """Return for each timeline the numbers of the segments among `names`; few ranges if names come in order."""
    result: dict[int, list[range]] = {}
    for name in names:
        add_segment(result, name, segment_bytes)
    return result


def add_segment(ranges_of: dict[int, list[range]], name: str, segment_bytes: int) -> None:
    """Add the segment `name` to what `ranges_by_timeline` returns; other names are passed over."""
    if (position := segment_position(name, segment_bytes)) is not None:
        timeline, number = position
        ranges = ranges_of.setdefault(timeline, [])
        if ranges and ranges[-1].stop == number:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))


def merged(ranges: Iterable[range]) -> list[range]:
    """Return the same numbers in as few ranges as possible, ascending."""
    result: list[range] = []
    for each in sorted((each for each in ranges if each), key=lambda each: each.start):
        if result and each.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(result[-1].stop, each.stop))
        else:
            result.append(each)
    return result


def lacking(wanted: range, there: Iterable[range]) -> Iterator[range]:
    """Yield the parts of `wanted` that are in none of `there`, which are ascending."""
    start = wanted.start
    for each in there:
        if start < min(each.start, wanted.stop):
            yield range(start, min(each.start, wanted.stop))
        start = max(start, each.stop)
    if start < wanted.stop:
        yield range(start, wanted.stop)


def _hole_after(
    missing: int,
    following: int | None,
    path: Sequence[Stretch],
    present: Mapping[int, Sequence[range]],
    segment_bytes: int,
) -> Hole | None:
    next_name = name_on_path(path, missing, segment_bytes)
    if following is not None:
        return Hole(next_name, name_on_path(path, following - 1, segment_bytes))
    # PostgreSQL would go on with a timeline that the path has left (not with one older than what it last read), and
    # replay what happened there.
    last_read = int(name_on_path(path, missing - 1, segment_bytes)[:8], 16)
    has_stray = any(
        stretch.timeline >= last_read and any(missing in each for each in present.get(stretch.timeline, ()))
        for stretch in path
    )
    return Hole(next_name, next_name) if has_stray else None
