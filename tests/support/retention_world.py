"""Generated repositories with a past: what retention meets, and a judge who restores by brute force."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis.strategies import DrawFn, booleans, composite, integers, lists, sampled_from

from agent.domain.catalog import Backup
from agent.domain.inventory import Inventory, TimelineWal
from agent.domain.retention import RetentionPolicy
from agent.domain.timeline import Ancestor, path_to
from agent.domain.wal import segment_name
from agent.domain.wal_runs import merged, name_on_path

SEGMENT_BYTES = 1 << 20
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_ACTIONS = ("write", "write", "write", "full", "full", "delta", "delta", "fail over", "rewind", "stray")


@dataclass(frozen=True)
class Point:
    """A moment that somebody may want back: what was committed at `time` up to `lsn` of a timeline."""

    time: datetime
    cluster: int
    timeline: int
    lsn: int


@dataclass
class Past:
    """A repository and how it came to be. `stored_at` is by timeline and segment number."""

    now: datetime = BEGIN
    cluster: int = 1
    timeline: int = 1
    lsn: int = SEGMENT_BYTES
    ends: dict[int, int] = field(default_factory=dict)
    histories: dict[int, tuple[Ancestor, ...]] = field(default_factory=dict)
    stored_at: dict[tuple[int, int], datetime] = field(default_factory=dict)
    backups: list[Backup] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def write(self, length: int) -> None:
        """Write WAL of the current timeline; what is complete is archived."""
        first = self.lsn // SEGMENT_BYTES
        self.lsn += length
        for number in range(first, self.lsn // SEGMENT_BYTES):
            self.stored_at[self.timeline, number] = self.now
        self.ends[self.timeline] = self.lsn
        self.points.append(Point(self.now, self.cluster, self.timeline, self.lsn // SEGMENT_BYTES * SEGMENT_BYTES))

    def back_up(self, *, hours: int, delta: bool, pinned: bool, corrupt_pages: int = 0) -> None:
        """Take a base backup, its WAL archived, unless there is one of that name."""
        parents = [b for b in self.backups if b.system_identifier == self.cluster and self.is_ancestor(b)]
        parent = max(parents, key=lambda b: b.finish_lsn) if delta and parents else None
        started, start_lsn = self.now, self.lsn + 40
        name = f"base_{segment_name(self.timeline, start_lsn, SEGMENT_BYTES)}"
        name += f"_D_{parent.start_segment}" if parent else ""
        if any(backup.name[:29] == name[:29] for backup in self.backups):
            return
        self.now += timedelta(hours=hours)
        self.write(SEGMENT_BYTES - self.lsn % SEGMENT_BYTES)
        self.backups.append(
            Backup(name, self.timeline, start_lsn, self.lsn, started, self.now, self.now, 150000, self.cluster, 9, 5,
                   pinned, parent.name if parent else None, (parent.full or parent.name) if parent else None,
                   parent.delta_count + 1 if parent else 0, 0, corrupt_pages)
        )  # fmt: skip

    def is_ancestor(self, backup: Backup) -> bool:
        """Tell whether the present comes from `backup`."""
        return self.leads_to(backup, self.timeline) and backup.finish_lsn <= self.lsn

    def leads_to(self, backup: Backup, timeline: int) -> bool:
        """Tell whether recovery from `backup` can follow to `timeline`."""
        path = path_to(timeline, self.histories.get(timeline, ()))
        ends = {stretch.timeline: stretch.to_lsn for stretch in path}
        return backup.timeline in ends and ((end := ends[backup.timeline]) is None or backup.finish_lsn <= end)

    def fork(self, timeline: int, lsn: int) -> None:
        """Promote a server that had replayed `timeline` up to `lsn`."""
        child = max([*self.histories, *self.ends, 1]) + 1
        kept = [each for each in self.histories.get(timeline, ()) if each.switch_lsn < lsn]
        self.histories[child] = (*kept, Ancestor(timeline, lsn))
        self.timeline, self.lsn = child, lsn
        self.write(SEGMENT_BYTES)

    def chain(self, backup: Backup, present: Collection[str]) -> bool:
        """Tell whether `backup` and all that it builds on is `present`."""
        while backup.name in present and backup.parent is not None:
            found = [each for each in self.backups if each.name == backup.parent]
            if not found:
                return False
            backup = found[0]
        return backup.name in present

    def trust(self, backup: Backup) -> int:
        """Return 0 if something of `backup` or of what it builds on is damaged, 1 if it has corrupt pages, else 2."""
        by_name, each = {known.name: known for known in self.backups}, backup
        while each.name not in self.damaged:
            if each.parent not in by_name:
                return 1 if backup.corrupt_pages else 2
            each = by_name[each.parent]
        return 0

    def segments(self, backup: Backup, timeline: int, lsn: int) -> Iterator[tuple[int, int]]:
        """Yield what PostgreSQL reads from the start of `backup` to `lsn` of `timeline`."""
        path = path_to(timeline, self.histories.get(timeline, ()))
        for number in range(backup.start_lsn // SEGMENT_BYTES, -(-lsn // SEGMENT_BYTES)):
            name = name_on_path(path, number, SEGMENT_BYTES)
            yield int(name[:8], 16), number

    def restorers(self, point: Point, present: Collection[str], wal: Collection[tuple[int, int]]) -> list[Backup]:
        """Return the base backups from which `point` can be restored with what is there."""
        return [
            backup
            for backup in self.backups
            if backup.system_identifier == point.cluster
            and backup.finish_lsn <= point.lsn
            and self.leads_to(backup, point.timeline)
            and self.chain(backup, present)
            and all(segment in wal for segment in self.segments(backup, point.timeline, point.lsn))
        ]

    def inventory(self) -> Inventory:
        """Return what the agent would see."""
        wal = {}
        for timeline in {timeline for timeline, _ in self.stored_at}:
            times = [at for (t, _), at in self.stored_at.items() if t == timeline]
            held = merged(range(n, n + 1) for t, n in self.stored_at if t == timeline)
            wal[timeline] = TimelineWal(held, min(times), max(times))
        return Inventory(self.now, self.backups, self.histories, wal, SEGMENT_BYTES, damaged=self.damaged)


@composite
def pasts(draw: DrawFn, *, gaps: bool = True) -> Past:
    """Weeks of writing, backups, failovers and restores to the past; perhaps another cluster, copying, lost WAL."""
    past = Past()
    count = draw(integers(3, 25))
    for action in draw(lists(sampled_from(_ACTIONS), min_size=count, max_size=count)):
        past.now += timedelta(hours=draw(integers(1, 60)))
        _act(draw, past, action)
    if not draw(integers(0, 5)):  # pg_upgrade: another cluster goes on from timeline 1
        past.cluster, past.timeline = 2, 1
        past.lsn = (max(n for _, n in past.stored_at) + 1) * SEGMENT_BYTES if past.stored_at else SEGMENT_BYTES
        for action in draw(lists(sampled_from(("write", "full", "delta")), max_size=8)):
            past.now += timedelta(hours=draw(integers(1, 60)))
            _act(draw, past, action)
    past.now += timedelta(hours=draw(integers(0, 300)))
    past.write(SEGMENT_BYTES)
    if gaps and not draw(integers(0, 3)):
        for lost in draw(lists(sampled_from(sorted(past.stored_at)), max_size=3, unique=True)):
            del past.stored_at[lost]
    if gaps and not draw(integers(0, 5)) and past.backups:
        past.backups.remove(draw(sampled_from(past.backups)))
    if not draw(integers(0, 3)) and past.backups:
        past.damaged = set(draw(lists(sampled_from([backup.name for backup in past.backups]), max_size=3)))
    if not draw(integers(0, 5)):  # the bucket was copied, in the order of names
        past.backups = [
            replace(backup, modified_at=past.now - timedelta(days=9) + timedelta(seconds=place))
            for place, backup in enumerate(sorted(past.backups, key=lambda backup: backup.name))
        ]
    return past


def _act(draw: DrawFn, past: Past, action: str) -> None:
    match action:
        case "write":
            past.write(draw(integers(1, 3 * SEGMENT_BYTES)))
        case "full" | "delta":
            past.back_up(
                hours=draw(integers(1, 12)), delta=action == "delta", pinned=not draw(integers(0, 4)),
                corrupt_pages=0 if draw(integers(0, 2)) else 7,
            )  # fmt: skip
        case "fail over":
            past.fork(past.timeline, past.lsn - draw(integers(0, 100)) if past.lsn > 2 * SEGMENT_BYTES else past.lsn)
        case "rewind":
            points = [p for p in past.points if p.cluster == past.cluster and p.lsn >= SEGMENT_BYTES]
            if points:
                point = draw(sampled_from(points))
                past.fork(point.timeline, point.lsn)
        case _:  # a server that was left behind goes on
            back = past.timeline, past.lsn
            past.timeline = draw(sampled_from(sorted(past.ends or {1: 0})))
            past.lsn = past.ends.get(past.timeline, past.lsn)
            past.write(draw(integers(SEGMENT_BYTES, 2 * SEGMENT_BYTES)))
            if draw(booleans()):
                past.timeline, past.lsn = back[0], past.ends.get(back[0], back[1])


@composite
def policies(draw: DrawFn) -> RetentionPolicy:
    """A window, a count, or both."""
    window = timedelta(days=draw(integers(1, 40))) if draw(booleans()) else None
    full = draw(integers(1, 4)) if window is None or draw(booleans()) else None
    return RetentionPolicy(window, full)
