"""Timeline histories: which timeline left which, and where."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent.domain.lsn import parse_lsn

_LINE = re.compile(r"\s*(\d+)\s+([0-9A-Fa-f]+/[0-9A-Fa-f]+)")


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A timeline that was left at `switch_lsn`, the first byte not taken from it."""

    timeline: int
    switch_lsn: int


def history_name(timeline: int) -> str:
    """Name the history file of a timeline: `00000002.history`. Timeline 1 has none."""
    return f"{timeline:08X}.history"


def parse_history(timeline: int, text: str) -> tuple[Ancestor, ...]:
    """Read the history file of `timeline`: its ancestors, oldest first.

    Raises:
        ValueError: A line is malformed, or the timelines do not ascend below `timeline`.

    Source: readTimeLineHistory() in PostgreSQL's src/backend/access/transam/timeline.c.
    """
    ancestors: list[Ancestor] = []
    for line in text.split("\n"):  # what follows the LSN may be a restore point's name, with characters that end lines
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"{history_name(timeline)}: cannot read the line {line!r}")
        ancestor = Ancestor(int(match[1]), parse_lsn(match[2]))
        if ancestors and ancestor.timeline <= ancestors[-1].timeline:
            raise ValueError(f"{history_name(timeline)}: timelines do not ascend")
        ancestors.append(ancestor)
    if ancestors and ancestors[-1].timeline >= timeline:
        raise ValueError(f"{history_name(timeline)}: names timeline {ancestors[-1].timeline} as an ancestor")
    return tuple(ancestors)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the way to a timeline's end: WAL of `timeline` from `from_lsn` up to `to_lsn` (None: open)."""

    timeline: int
    from_lsn: int
    to_lsn: int | None


def path_to(timeline: int, ancestors: Sequence[Ancestor]) -> tuple[Stretch, ...]:
    """Return the stretches of WAL that lead from LSN 0 to the end of `timeline`, in order.

    A recovery that follows a timeline, and ends before it was begun, names it as the parent all the same: then a later
    line of the history has an earlier LSN, and holds over those before it.
    Source: writeTimeLineHistory() and tliOfPointInHistory() in PostgreSQL's timeline.c.
    """
    stretches: list[Stretch] = []
    stop = start = ancestors[-1].switch_lsn if ancestors else 0
    for index in range(len(ancestors) - 1, -1, -1):
        begin = ancestors[index - 1].switch_lsn if index else 0
        if begin < stop:
            stretches.insert(0, Stretch(ancestors[index].timeline, begin, stop))
            stop = begin
    return (*stretches, Stretch(timeline, start, None))


def timeline_at(path: Sequence[Stretch], lsn: int) -> int:
    """Return the timeline whose WAL holds the byte at `lsn` on this path.

    Source: tliOfPointInHistory() in PostgreSQL's src/backend/access/transam/timeline.c.
    """
    for stretch in path:
        if stretch.from_lsn <= lsn and (stretch.to_lsn is None or lsn < stretch.to_lsn):
            return stretch.timeline
    raise ValueError("a path covers every LSN")


def newest_timeline(known: Mapping[int, Sequence[Ancestor]], start: int) -> int:
    """Follow PostgreSQL's `latest`: from `start`, the highest timeline id whose history file exists without a hole.

    Source: findNewestTimeLine() in PostgreSQL's src/backend/access/transam/timeline.c.
    """
    newest = start
    while newest + 1 in known:
        newest += 1
    return newest
