"""Generated archives: timelines of WAL with base backups in them, and what PostgreSQL makes of a restore from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from hypothesis.strategies import DrawFn, booleans, composite, integers, lists, sampled_from

from agent.domain.archived_path import Holdings
from agent.domain.catalog import Backup
from agent.domain.restore_plan import RestorePlan, plan_restore
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.timeline import Ancestor, path_to, timeline_at
from agent.domain.wal import segment_name
from agent.domain.wal_records import RecordKind, WalRecord, from_wal_time
from agent.domain.wal_runs import ranges_by_timeline
from agent.domain.wal_scan import scan_segment
from agent.domain.wal_search import Answer, Rules, TimesOf
from agent.domain.wal_times import segment_times
from tests.support.wal_writer import SEGMENT_BYTES, WalWriter, to_wal_time

T = TypeVar("T")

BEGIN = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
_OTHER = RecordKind.PARAMETER_CHANGE  # stands for all records of no interest
_TIMELESS = (_OTHER, RecordKind.SWITCH, RecordKind.BACKUP_END)
_ACTIONS = ("commit", "commit", "commit", "abort", "bulk", "bulk", "point", "checkpoint", "switch", "backup", "delta")


@dataclass
class Replay:
    """How a recovery ends.

    reached: it stopped at its target, or at the end of the WAL if it had none. consistent: the base backup was whole by
    then. stop_lsn: what begins before it has been replayed.
    """

    reached: bool
    consistent: bool
    stop_lsn: int


@dataclass
class World:
    """Timelines with their WAL, and what of it is archived."""

    writers: dict[int, WalWriter] = field(default_factory=lambda: {1: WalWriter()}, repr=False)
    records: dict[int, list[WalRecord]] = field(default_factory=lambda: {1: []})
    histories: dict[int, tuple[Ancestor, ...]] = field(default_factory=dict)
    backups: list[Backup] = field(default_factory=list)
    archived: dict[str, bytes] = field(default_factory=dict, repr=False)
    now: datetime = BEGIN
    timeline: int = 1
    xid: int = 700

    @property
    def writer(self) -> WalWriter:
        """Of the timeline that is being written."""
        return self.writers[self.timeline]

    def note(
        self, kind: RecordKind, where: tuple[int, int], *, xid: int = 0, name: str = "", start_lsn: int = 0
    ) -> None:
        """Remember a record that was written now."""
        moment = self.now.replace(microsecond=0) if kind is RecordKind.CHECKPOINT else self.now
        wal_time = None if kind in _TIMELESS else to_wal_time(moment)
        self.records[self.timeline].append(WalRecord(kind, *where, xid, wal_time, name, start_lsn))

    def checkpoint(self) -> int:
        """Write one; return where it begins."""
        following = self.xid + 1  # transactions here begin when they end
        where = self.writer.checkpoint(int(self.now.timestamp()), next_xid=following, oldest_active_xid=following)
        self.note(RecordKind.CHECKPOINT, where)
        return where[0]

    def switch(self) -> None:
        """Switch to a new segment."""
        self.note(RecordKind.SWITCH, self.writer.switch())

    def end_transaction(self, *, commits: bool) -> None:
        """Commit or abort one."""
        self.xid += 1
        where = self.writer.transaction(0x00 if commits else 0x20, self.xid, to_wal_time(self.now))
        self.note(RecordKind.COMMIT if commits else RecordKind.ABORT, where, xid=self.xid)

    def restore_point(self, name: str) -> None:
        """Write one."""
        where = self.writer.restore_point(name, to_wal_time(self.now))
        self.note(RecordKind.RESTORE_POINT, where, name=name)

    def back_up(self, transactions: int, *, late: timedelta, parent: Backup | None, corrupt_pages: int = 0) -> None:
        """Take a base backup during which some transactions commit; the clock says its end is `late`."""
        start_time = self.now
        start_lsn = self.checkpoint()
        for _ in range(transactions):
            self.now += timedelta(milliseconds=700)
            self.end_transaction(commits=True)
        where = self.writer.backup_end(start_lsn)
        self.note(RecordKind.BACKUP_END, where, start_lsn=start_lsn)
        self.switch()
        segment = segment_name(self.timeline, start_lsn, SEGMENT_BYTES)
        self.backups.append(
            Backup(
                name=f"base_{segment}" + (f"_D_{parent.start_segment}" if parent else ""),
                timeline=self.timeline,
                start_lsn=start_lsn,
                finish_lsn=where[1],
                start_time=start_time,
                finish_time=self.now + late,
                modified_at=self.now + late,
                pg_version=150000,
                system_identifier=None,
                size_bytes=1000,
                stored_bytes=500,
                permanent=False,
                parent=parent.name if parent else None,
                full=(parent.full or parent.name) if parent else None,
                delta_count=parent.delta_count + 1 if parent else 0,
                corrupt_pages=corrupt_pages,
            )
        )

    def fork(self, records_back: int) -> None:
        """Promote a server that had replayed this timeline but for its last records."""
        records = self.records[self.timeline]
        kept = records[: max(1, len(records) - records_back)]
        switch_lsn = kept[-1].end_lsn
        parent, self.timeline = self.timeline, max(self.writers) + 1
        self.histories[self.timeline] = (*self.histories.get(parent, ()), Ancestor(parent, switch_lsn))
        self.writers[self.timeline] = self.writers[parent].fork(switch_lsn, self.timeline)
        self.records[self.timeline] = []
        self.now += timedelta(seconds=1)
        self.note(RecordKind.END_OF_RECOVERY, self.writer.end_of_recovery(to_wal_time(self.now)))

    def archive(self) -> None:
        """Archive all complete segments of all timelines, each timeline's copy of those it shares from its fork on."""
        for timeline, writer in self.writers.items():
            ancestors = self.histories.get(timeline, ())
            first = ancestors[-1].switch_lsn if ancestors else 0
            for index, content in enumerate(writer.segments()):
                start_lsn = SEGMENT_BYTES + index * SEGMENT_BYTES
                if first < start_lsn + SEGMENT_BYTES <= writer.lsn:
                    self.archived[segment_name(timeline, start_lsn, SEGMENT_BYTES)] = content

    def holdings(self) -> Holdings:
        """What a repository with all this holds."""
        wal = ranges_by_timeline(sorted(self.archived), SEGMENT_BYTES)
        return Holdings(self.backups, self.histories, wal, SEGMENT_BYTES)

    def plan(self, target: RestoreTarget, backup_name: str | None = None) -> RestorePlan:
        """Plan with the real rules, which see nothing but the archived bytes."""
        return self.follow(plan_restore(self.holdings(), target, backup_name))

    def follow(self, rules: Rules[T]) -> T:
        """Answer the questions of `rules`; return what they return."""
        answer: Answer | None = None
        while True:
            try:
                question = next(rules) if answer is None else rules.send(answer)
            except StopIteration as end:
                found: T = end.value
                return found
            ask = segment_times if isinstance(question, TimesOf) else scan_segment
            answer = [ask(self.archived[name]) for name in question.names]

    def on_path(self, timeline: int) -> list[WalRecord]:
        """Return all records on the way to the end of `timeline`."""
        path = path_to(timeline, self.histories.get(timeline, ()))
        return [
            record
            for stretch in path
            for record in self.records[stretch.timeline]
            if stretch.from_lsn <= record.lsn and (stretch.to_lsn is None or record.lsn < stretch.to_lsn)
        ]

    def name_on_path(self, timeline: int, lsn: int) -> str:
        """Name the segment that PostgreSQL asks for first to read `lsn` on the way to the end of `timeline`."""
        path = path_to(timeline, self.histories.get(timeline, ()))
        last_byte = lsn - lsn % SEGMENT_BYTES + SEGMENT_BYTES - 1
        return segment_name(timeline_at(path, last_byte), lsn, SEGMENT_BYTES)

    def replay(self, backup: Backup, target: RestoreTarget, timeline: int, segments: Sequence[str]) -> Replay:
        """Recover as PostgreSQL does, with only `segments` to read."""
        consistent = False
        for record in self.on_path(timeline):
            if record.lsn < backup.start_lsn:
                continue
            needed = {self.name_on_path(timeline, lsn) for lsn in (record.lsn, record.end_lsn - 1)}
            if not needed <= set(segments):
                break
            if _stops_before(record, target):
                return Replay(reached=True, consistent=consistent, stop_lsn=record.lsn)
            consistent |= record.kind is RecordKind.BACKUP_END and record.start_lsn == backup.start_lsn
            if _stops_after(record, target) or (consistent and target.kind is TargetKind.IMMEDIATE):
                return Replay(reached=True, consistent=consistent, stop_lsn=record.end_lsn)
        end_lsn = next(
            lsn
            for lsn in range(backup.start_lsn - backup.start_lsn % SEGMENT_BYTES, 1 << 40, SEGMENT_BYTES)
            if self.name_on_path(timeline, lsn) not in segments
        )
        return Replay(reached=target.kind is TargetKind.END_OF_WAL, consistent=consistent, stop_lsn=end_lsn)


def quiet_world() -> World:
    """A base backup and a commit every 10 seconds in a segment of its own, a second base backup after the third."""
    world = World()
    world.end_transaction(commits=True)
    world.back_up(1, late=timedelta(0), parent=None)
    for number in range(6):
        world.now += timedelta(seconds=10)
        world.end_transaction(commits=True)
        world.switch()
        if number == 2:
            world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    return world


def _stops_before(record: WalRecord, target: RestoreTarget) -> bool:
    """Source: recoveryStopsBefore() in PostgreSQL's xlogrecovery.c."""
    if target.kind is TargetKind.LSN and not target.inclusive:
        assert target.lsn is not None
        return record.lsn >= target.lsn
    if not record.ends_transaction or record.time is None:
        return False
    if target.kind is TargetKind.XID and not target.inclusive:
        return record.xid == target.xid
    if target.kind is TargetKind.TIME:
        assert target.time is not None
        return record.time > target.time if target.inclusive else record.time >= target.time
    return False


def _stops_after(record: WalRecord, target: RestoreTarget) -> bool:
    """Source: recoveryStopsAfter() in PostgreSQL's xlogrecovery.c."""
    match target.kind:
        case TargetKind.NAME:
            return record.kind is RecordKind.RESTORE_POINT and record.name == target.name
        case TargetKind.LSN:
            assert target.lsn is not None
            return target.inclusive and record.lsn >= target.lsn
        case TargetKind.XID:
            return target.inclusive and record.ends_transaction and record.xid == target.xid
        case _:
            return False


@composite
def worlds(draw: DrawFn, *, is_set_back: bool = False) -> World:
    """Up to three timelines, some base backups, and an archive from which segments may be missing.

    `is_set_back`: the clock is, now and then.
    """
    world = World()
    world.end_transaction(commits=True)
    world.back_up(draw(integers(0, 2)), late=timedelta(milliseconds=draw(integers(0, 1500))), parent=None)
    for epoch in range(draw(integers(1, 3))):
        if epoch:
            if draw(booleans()):
                world.switch()  # the old server went on and archived what it had
            world.fork(draw(integers(0, 6)))
        for action in draw(lists(sampled_from(_ACTIONS), min_size=1, max_size=10)):
            back = 20_000 if is_set_back and draw(integers(0, 3)) == 0 else 0
            world.now += timedelta(milliseconds=draw(integers(1, 20_000)) - back)
            _act(draw, world, action)
    if draw(integers(0, 3)):
        world.switch()
    world.archive()
    if not draw(integers(0, 3)):
        for name in draw(lists(sampled_from(sorted(world.archived)), min_size=1, max_size=2, unique=True)):
            del world.archived[name]
    return world


def _act(draw: DrawFn, world: World, action: str) -> None:
    match action:
        case "commit" | "abort":
            world.end_transaction(commits=action == "commit")
        case "bulk":
            world.note(_OTHER, world.writer.filler(draw(integers(0, SEGMENT_BYTES * 3 // 2))))
        case "point":
            name = draw(sampled_from(["a", "b"]))
            world.restore_point(name)
        case "checkpoint":
            world.checkpoint()
        case "switch":
            world.switch()
        case _:
            parent = world.backups[-1] if action == "delta" and world.backups else None
            late = timedelta(milliseconds=draw(integers(0, 1500)))
            corrupt = 0 if draw(integers(0, 2)) else 5
            world.back_up(draw(integers(0, 2)), late=late, parent=parent, corrupt_pages=corrupt)


@composite
def targets(draw: DrawFn, world: World) -> RestoreTarget:
    """A target in, near or outside what `world` holds."""
    records = [record for timeline in world.records for record in world.records[timeline]]
    near = draw(sampled_from([record for record in records if record.wal_time is not None]))
    inclusive = draw(booleans())
    timeline = draw(sampled_from(["latest", "latest", *map(str, world.writers)]))
    match draw(sampled_from([*TargetKind, TargetKind.TIME, TargetKind.TIME])):
        case TargetKind.TIME:
            assert near.wal_time is not None
            moment = from_wal_time(near.wal_time) + timedelta(
                microseconds=draw(integers(-2, 2)) * 10 ** draw(integers(0, 6))
            )
            return RestoreTarget(TargetKind.TIME, time=moment, inclusive=inclusive, timeline=timeline)
        case TargetKind.LSN:
            lsn = max(0, near.lsn + draw(integers(-40, 40)))
            return RestoreTarget(TargetKind.LSN, lsn=lsn, inclusive=inclusive, timeline=timeline)
        case TargetKind.XID:
            return RestoreTarget(
                TargetKind.XID, xid=draw(integers(698, world.xid + 2)), inclusive=inclusive, timeline=timeline
            )
        case TargetKind.NAME:
            return RestoreTarget(TargetKind.NAME, name=draw(sampled_from("abc")), timeline=timeline)
        case kind:
            return RestoreTarget(kind, timeline=timeline)
