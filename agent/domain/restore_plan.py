"""What a restore needs: which base backup, which WAL, and where replay stops; or why there is no way.

The rules decide; they read nothing. Where the answer is in the WAL itself, they ask: `plan_restore` is a generator that
yields names of WAL segments, is sent their scans in the same order, and returns the plan:

    rules = plan_restore(holdings, target)
    names = next(rules)
    while True: names = rules.send(scans_of(names))     # until StopIteration, whose value is the plan

It looks at the end of the WAL first and halves its way to a time, so that few segments of a large archive are read. To
find a transaction or a restore point it must read on from the base backup.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeAlias, TypeVar

from agent.domain.catalog import Backup
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import RestoreTarget, TargetKind, format_time
from agent.domain.timeline import Ancestor, history_name, newest_timeline, path_to
from agent.domain.wal import parse_segment_name
from agent.domain.wal_records import (
    RecordJoiner,
    RecordKind,
    SegmentScan,
    WalRecord,
    from_wal_time,
    to_wal_time,
)
from agent.domain.wal_runs import Hole, WalRun, wal_runs
from agent.errors import NoRestorePath

_T = TypeVar("_T")
Rules: TypeAlias = Generator[Sequence[str], Sequence[SegmentScan], _T]

# Metadata's finish time is taken after the backup's last record, up to seconds later; a clock is read on each side.
_FINISH_TIME_MARGIN = timedelta(seconds=5)
# Segments before a base backup that are searched for the last commit in it.
_LOOK_BACK_SEGMENTS = 4
# Segments asked for at once where all must be read.
_BATCH_SEGMENTS = 4


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the repository holds.

    backups: the catalog.
    histories: the archived timeline histories.
    segments: names of the archived WAL segments, of all timelines.
    segment_bytes: `wal_segment_size`.
    """

    backups: Sequence[Backup]
    histories: Mapping[int, Sequence[Ancestor]]
    segments: Sequence[str]
    segment_bytes: int


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How one target is reached.

    backup: the base backup that recovery begins from.
    chain: the base backups to hydrate, the full one first, `backup` last.
    target: what was asked for.
    effective_target: what PostgreSQL is to be told. Its timeline is a decimal number, or `current` if that timeline has
        no history file: PostgreSQL refuses the number then, and takes the base backup's own. It differs from `target`
        where PostgreSQL would refuse the target although nothing is missing; `note` then says so. Whatever is archived
        after the plan was made, it leads no further.
    timeline: the timeline that replay follows: recovery_target_timeline.
    segment_bytes: `wal_segment_size` of the archived WAL.
    segments: names of the WAL segments that replay reads, in order; none is missing.
    stop_lsn: start of the record that replay stops at or before, None if it runs to the end of the WAL or stops as soon
        as it is consistent.
    download_bytes: what is downloaded, base backups and WAL, as stored.
    restored_bytes: what the base backups write, before compression.
    note: a sentence for the operator, or empty.
    """

    backup: Backup
    chain: tuple[Backup, ...]
    target: RestoreTarget
    effective_target: RestoreTarget
    timeline: int
    segment_bytes: int
    segments: tuple[str, ...]
    stop_lsn: int | None = None
    download_bytes: int = 0
    restored_bytes: int = 0
    note: str = ""

    @property
    def first_segment(self) -> str:
        """Name of the first WAL segment that replay reads."""
        return self.segments[0]

    @property
    def last_segment(self) -> str:
        """Name of the last WAL segment that replay reads."""
        return self.segments[-1]


def plan_restore(held: Holdings, target: RestoreTarget, backup_name: str | None = None) -> Rules[RestorePlan]:
    """Decide how `target` is reached, from the base backup `backup_name` or else the newest that can reach it.

    Yields the names of segments to be scanned, see above.

    Raises:
        NoRestorePath: It cannot be reached. The message says why, the hint what can be.
    """
    named = [backup for backup in held.backups if backup_name in (None, backup.name)]
    if not named:
        raise NoRestorePath(
            f"there is no base backup {backup_name}" if held.backups else "the repository holds no base backup",
            hint="`pitr backup list` shows what there is.",
        )
    timeline = resolve_timeline(held, target.timeline, named)
    return (yield from _Planner(held, target, named, timeline).plan())


def resolve_timeline(held: Holdings, wanted: str, backups: Sequence[Backup]) -> int:
    """Turn `latest`, `current` or a number into the timeline to follow from one of `backups`.

    A timeline is known by its history file, or by a base backup on it: the repository of a server that was promoted
    before has no history of that. `latest` is PostgreSQL's: from the highest with a base backup on, the highest id that
    is reached without leaving one out. `current` is that of the newest of `backups`.

    Raises:
        NoRestorePath: There is no such timeline, or its history is not archived.
    """
    if wanted == "current":
        timeline = max(backups, key=lambda backup: backup.modified_at).timeline
    elif wanted == "latest":
        timeline = newest_timeline(held.histories, max(backup.timeline for backup in held.backups))
        # What ended before the oldest base backup cannot come from the way.
        oldest = min(backup.start_lsn for backup in held.backups) // held.segment_bytes
        beyond = max(
            (number for number, held_of in _numbers_by_timeline(held).items() if max(held_of) >= oldest),
            default=timeline,
        )
        if beyond > timeline:
            # Following the lower one would lose, in silence, what was written since the last switch.
            raise NoRestorePath(
                f"WAL of timeline {beyond} is archived, but the history files up to {history_name(beyond)} are not all",
                hint=f"Put them back into the repository, or set TARGET_TIMELINE={timeline} to do without that WAL.",
            )
    else:
        timeline = int(wanted)
    known = {1, *held.histories, *(backup.timeline for backup in held.backups)}
    if timeline not in known:
        raise NoRestorePath(
            f"the history file {history_name(timeline)} of timeline {timeline} is not in the repository",
            hint=f"TARGET_TIMELINE can be latest or one of {', '.join(map(str, sorted(known)))}.",
        )
    return timeline


class _Kind(StrEnum):
    """Why a base backup does not serve a target, in the order in which it explains a refusal."""

    BROKEN = "WAL or a parent that it needs is missing"
    NOT_SHOWN = "the WAL after it does not show the target"
    TOO_EARLY = "the target is before its end"
    OFF_PATH = "it is of another branch"


class _Unfit(Exception):
    """A base backup does not serve the target, for the reason given."""

    def __init__(self, reason: str, kind: _Kind = _Kind.BROKEN) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Way:
    """How a base backup reaches the target: see the fields of `RestorePlan`.

    instead: what PostgreSQL is to be told instead of the target.
    """

    segments: tuple[str, ...]
    stop_lsn: int | None = None
    instead: RestoreTarget | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _LastMoments:
    """What the end of a run of WAL shows.

    transaction, anything: time (WAL's) of the last transaction that ended, and of the last record with a time.
    last_lsn: start of the last record that was seen, of any kind; at or after those two.
    reach: the run, up to damage that was seen on the way.
    """

    transaction: int | None
    anything: int | None
    last_lsn: int | None
    reach: WalRun


class _Planner:
    """Plans for one target on one timeline."""

    def __init__(self, held: Holdings, target: RestoreTarget, backups: Sequence[Backup], timeline: int) -> None:
        self._held = held
        self._target = target
        self._timeline = timeline
        self._path = path_to(timeline, held.histories.get(timeline, ()))
        self._runs = wal_runs(self._path, _numbers_by_timeline(held), held.segment_bytes)
        # On one path the order of LSNs is the order in time, whatever clocks say.
        self._newest_first = sorted(backups, key=lambda backup: backup.finish_lsn, reverse=True)
        self._searched_from: int | None = None

    def plan(self) -> Rules[RestorePlan]:
        unfit: list[tuple[Backup, _Unfit]] = []
        for backup in self._newest_first:
            try:
                self._require_on_path(backup)
                chain = self._chain(backup)
                wal = self._wal_from(backup)
                way = yield from self._way(backup, wal)
            except _Unfit as reason:
                unfit.append((backup, reason))
                continue
            passed_over = [f"base backup {b.name} is not used: {r}" for b, r in unfit if r.kind is _Kind.BROKEN]
            return RestorePlan(
                backup=backup,
                chain=chain,
                target=self._target,
                effective_target=replace(way.instead or self._target, timeline=self._recovery_target_timeline()),
                timeline=self._timeline,
                segment_bytes=wal.segment_bytes,
                segments=way.segments,
                stop_lsn=way.stop_lsn,
                restored_bytes=sum(part.size_bytes for part in chain),
                note="; ".join([way.note, *passed_over] if way.note else passed_over),
            )
        raise (yield from self._refusal(unfit))

    def _recovery_target_timeline(self) -> str:
        """Source: validateRecoveryParameters() in PostgreSQL's xlogrecovery.c (13, 14: xlog.c)."""
        has_history = self._timeline == 1 or self._timeline in self._held.histories
        return str(self._timeline) if has_history else "current"

    def _require_on_path(self, backup: Backup) -> None:
        stretch = next((s for s in self._path if s.timeline == backup.timeline), None)
        if stretch is None:
            raise _Unfit(
                f"it is on timeline {backup.timeline}, which timeline {self._timeline} does not come from",
                _Kind.OFF_PATH,
            )
        if stretch.to_lsn is not None and stretch.to_lsn < backup.finish_lsn:
            raise _Unfit(
                f"it ended at {format_lsn(backup.finish_lsn)}, but the way to timeline {self._timeline} left timeline "
                f"{backup.timeline} before, at {format_lsn(stretch.to_lsn)}",
                _Kind.OFF_PATH,
            )

    def _chain(self, backup: Backup) -> tuple[Backup, ...]:
        by_name = {held.name: held for held in self._held.backups}
        chain = [backup]
        while (parent := chain[0].parent) is not None:
            if parent not in by_name or by_name[parent] in chain:
                raise _Unfit(f"base backup {parent}, which it builds on, is missing")
            chain.insert(0, by_name[parent])
        return tuple(chain)

    def _wal_from(self, backup: Backup) -> WalRun:
        """Return the unbroken WAL from the backup's start on; it holds at least what makes the backup consistent."""
        for run in self._runs:
            if run.start_lsn <= backup.start_lsn < run.end_lsn:
                if not run.holds(backup.start_lsn, backup.finish_lsn):
                    raise _Unfit(f"{run.hole or 'WAL'} before its end at {format_lsn(backup.finish_lsn)}")
                return run.from_index(run.index(backup.start_lsn))
        raise _Unfit(f"the WAL segment {backup.start_segment} that it begins in is missing")

    def _way(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        match self._target.kind:
            case TargetKind.IMMEDIATE:
                return _Way(wal.segments_to(backup.finish_lsn))
            case TargetKind.END_OF_WAL:
                _require_no_hole(wal)
                return _Way(wal.segments)
            case TargetKind.TIME:
                return (yield from self._to_time(backup, wal))
            case TargetKind.LSN:
                return (yield from self._to_lsn(backup, wal))
            case TargetKind.XID | TargetKind.NAME:
                return (yield from self._to_record(backup, wal))

    def _to_time(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        moment = self._target.time
        assert moment is not None
        yield from self._require_complete_by(backup, moment)
        last = yield from _last_moments(wal, wal.end_lsn)
        wal = last.reach
        if last.transaction is not None and self._is_beyond(last.transaction):
            record = yield from self._first_beyond(backup, wal)
            return _Way(wal.segments_to(record.end_lsn), stop_lsn=record.lsn)
        if last.anything is not None and last.anything >= to_wal_time(moment):
            # PostgreSQL knows a time by transactions only. Without any target it would replay what is archived later.
            _require_no_hole(wal)
            assert last.last_lsn is not None
            return _Way(
                wal.segments,
                stop_lsn=last.last_lsn,
                instead=RestoreTarget(TargetKind.LSN, lsn=last.last_lsn),
                note=f"no transaction ended after {format_time(moment)}: replay goes to the end of the WAL archived by "
                f"now, LSN {format_lsn(last.last_lsn)}",
            )
        shown = "" if last.anything is None else f" after {format_time(from_wal_time(last.anything))}"
        raise _Unfit(f"the archived WAL shows nothing{shown}" + _because(wal.hole), _Kind.NOT_SHOWN)

    def _is_beyond(self, wal_time: int) -> bool:
        """Tell whether a transaction that ended at `wal_time` is after the target, so that replay stops before it.

        Source: recoveryStopsBefore() in PostgreSQL's src/backend/access/transam/xlogrecovery.c.
        """
        assert self._target.time is not None
        moment = to_wal_time(self._target.time)
        return wal_time > moment if self._target.inclusive else wal_time >= moment

    def _require_complete_by(self, backup: Backup, moment: datetime) -> Rules[None]:
        """Return if the backup holds no transaction after `moment`.

        PostgreSQL does not always notice such a target: with no transaction between start and end of the backup it
        would open with everything the backup holds. The metadata's finish time may be later than the true end, so
        close to it the last transaction in the backup decides.
        """
        if moment >= backup.finish_time + _FINISH_TIME_MARGIN:
            return
        too_early = _Unfit(f"it was complete only at {format_time(backup.finish_time)}", _Kind.TOO_EARLY)
        if moment < backup.start_time:
            raise too_early
        last = yield from self._last_transaction_before(backup)
        if self._is_beyond(last) if last is not None else moment < backup.finish_time:
            raise too_early

    def _last_transaction_before(self, backup: Backup) -> Rules[int | None]:
        """Return when the last transaction before the backup's end ended, None if the WAL nearby does not say."""
        run = next(run for run in self._runs if run.holds(backup.start_lsn, backup.finish_lsn))
        first = max(0, run.index(backup.start_lsn) - _LOOK_BACK_SEGMENTS)
        last = yield from _last_moments(run.from_index(first), backup.finish_lsn)
        return last.transaction

    def _first_beyond(self, backup: Backup, wal: WalRun) -> Rules[WalRecord]:
        """Return the record that replay stops before: the first transaction ended after the target.

        Times are taken to ascend, as they do unless a clock was set back. That is used only to find where to begin.
        """
        low = first = wal.index(backup.finish_lsn - 1)
        high = len(wal.segments) - 1
        while low < high:
            middle = (low + high) // 2
            probe, is_beyond = yield from self._probe(wal.segments[middle:high])
            if is_beyond is False:
                low = middle + probe + 1
            else:
                high = middle + probe
        # One segment back: a record may end in the segment found, but begin in the one before.
        begin = wal.start_lsn + max(low - 1, first) * wal.segment_bytes
        record = yield from _first_match(wal, max(begin, backup.start_lsn), wal.end_lsn, self._ends_beyond)
        if record is None:
            raise _Unfit("the WAL after it is damaged before the target")
        if record.lsn < backup.finish_lsn:
            raise _Unfit(f"a transaction in it ended at {_written(record.wal_time)}", _Kind.TOO_EARLY)
        return record

    def _probe(self, names: Sequence[str]) -> Rules[tuple[int, bool | None]]:
        """Return the index of a segment near the first that shows times, and whether it reaches beyond the target.

        None if no segment looked at shows any: a bulk load may go on for thousands of them.
        """
        index = 0
        while index < len(names):
            (scan,) = yield (names[index],)
            is_beyond = self._reaches_beyond(scan)
            if is_beyond is not None:
                return index, is_beyond
            index = 2 * index + 1
        return 0, None

    def _reaches_beyond(self, scan: SegmentScan) -> bool | None:
        timed = [(record.kind, record.wal_time) for record in scan.records if record.wal_time is not None]
        exact = [wal_time for kind, wal_time in timed if kind is not RecordKind.CHECKPOINT]
        if exact:
            return self._is_beyond(max(exact))
        # A checkpoint's time may be minutes older than its place in the WAL: it proves only one of the two.
        return True if any(self._is_beyond(wal_time) for _, wal_time in timed) else None

    def _ends_beyond(self, record: WalRecord) -> bool:
        return record.ends_transaction and record.wal_time is not None and self._is_beyond(record.wal_time)

    def _to_lsn(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        """Replay stops at the first record that begins at the target or after it, so there must be one.

        Source: recoveryStopsBefore() and recoveryStopsAfter() in xlogrecovery.c.
        """
        lsn = self._target.lsn
        assert lsn is not None
        if lsn < backup.finish_lsn:
            raise _Unfit(f"it was complete only at {format_lsn(backup.finish_lsn)}", _Kind.TOO_EARLY)
        joiner = RecordJoiner()
        for index in range(wal.index(lsn), len(wal.segments)):
            (scan,) = yield (wal.segments[index],)
            joiner.take(scan)
            if joiner.last_lsn is not None and joiner.last_lsn >= lsn:
                return _Way(wal.segments[: index + 1], stop_lsn=lsn)
            if joiner.ended:
                break
        raise _Unfit("no record in the archived WAL begins there or later" + _because(wal.hole), _Kind.NOT_SHOWN)

    def _to_record(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        """Replay stops at the first match after the base backup's start, even if another follows."""
        until = wal.end_lsn if self._searched_from is None else self._searched_from
        record = yield from _first_match(wal, backup.start_lsn, until, self._is_target)
        if record is None:
            self._searched_from = backup.start_lsn
            raise _Unfit("the WAL archived after it does not show the target" + _because(wal.hole), _Kind.NOT_SHOWN)
        if record.lsn < backup.finish_lsn:
            raise _Unfit(f"the target, at {format_lsn(record.lsn)}, is before its end", _Kind.TOO_EARLY)
        return _Way(wal.segments_to(record.end_lsn), stop_lsn=record.lsn)

    def _is_target(self, record: WalRecord) -> bool:
        if self._target.kind is TargetKind.NAME:
            return record.kind is RecordKind.RESTORE_POINT and record.name == self._target.name
        assert self._target.xid is not None
        return record.ends_transaction and record.xid == self._target.xid & 0xFFFFFFFF  # WAL holds no epoch

    def _refusal(self, unfit: Sequence[tuple[Backup, _Unfit]]) -> Rules[NoRestorePath]:
        explains = {kind: [pair for pair in unfit if pair[1].kind is kind] for kind in _Kind}
        explains[_Kind.TOO_EARLY].reverse()  # of the oldest: all the others are later still
        backup, reason = next(pairs[0] for pairs in explains.values() if pairs)
        before = after = None
        if self._target.kind is TargetKind.TIME:
            before, after = yield from self._nearest()
        return NoRestorePath(
            f"{self._target} cannot be reached on timeline {self._timeline}: base backup {backup.name}: {reason}",
            hint=_hint(before, after),
            nearest_before=before,
            nearest_after=after,
        )

    def _nearest(self) -> Rules[tuple[datetime | None, datetime | None]]:
        """Return the nearest moments before and after the target time that can be reached."""
        moment = self._target.time
        assert moment is not None
        before: list[datetime] = []
        after: list[datetime] = []
        for backup in self._newest_first:
            try:
                self._require_on_path(backup)
                self._chain(backup)
                wal = self._wal_from(backup)
            except _Unfit:
                continue
            last = yield from _last_moments(wal, wal.end_lsn)
            if last.transaction is not None and (ended := from_wal_time(last.transaction)) <= moment:
                before.append(ended)
            if backup.finish_time > moment:
                after.append(backup.finish_time)
        return max(before, default=None), min(after, default=None)


def _last_moments(wal: WalRun, until_lsn: int) -> Rules[_LastMoments]:
    """Read backwards from the end of `wal` until a transaction is found that ended before `until_lsn`."""
    anything: int | None = None
    last_lsn: int | None = None
    later: list[SegmentScan] = []
    for index in range(wal.index(until_lsn - 1), -1, -1):
        (scan,) = yield (wal.segments[index],)
        if later and not scan.is_whole:
            wal, later, anything, last_lsn = wal.broken_at(index), [], None, None
        joiner = RecordJoiner()
        records = [r for joined in (scan, *later) for r in joiner.take(joined) if r.end_lsn <= until_lsn]
        last_lsn = joiner.last_lsn if last_lsn is None else last_lsn
        times = [record.wal_time for record in records if record.wal_time is not None]
        anything = max([*times, *([] if anything is None else [anything])], default=None)
        ended = [r.wal_time for r in records if r.ends_transaction and r.wal_time is not None]
        if ended:
            return _LastMoments(max(ended), anything, last_lsn, wal)
        later = [scan]
    return _LastMoments(None, anything, last_lsn, wal)


def _first_match(
    wal: WalRun, from_lsn: int, until_lsn: int, matches: Callable[[WalRecord], bool]
) -> Rules[WalRecord | None]:
    """Read on from `from_lsn`; return the first matching record that begins before `until_lsn`, or None."""
    joiner = RecordJoiner()
    for index in range(wal.index(from_lsn), len(wal.segments), _BATCH_SEGMENTS):
        scans = yield wal.segments[index : index + _BATCH_SEGMENTS]
        for record in (record for scan in scans for record in joiner.take(scan)):
            if record.lsn >= until_lsn:
                return None
            if record.lsn >= from_lsn and matches(record):
                return record
        if joiner.ended:
            break
    return None


def _require_no_hole(wal: WalRun) -> None:
    if wal.hole is not None:
        raise _Unfit(f"{wal.hole}, though WAL after that is there")


def _because(hole: Hole | None) -> str:
    return f": {hole}, though WAL after that is there" if hole else ""


def _hint(before: datetime | None, after: datetime | None) -> str:
    nearest = [f"{word} it: {format_time(moment)}" for word, moment in (("before", before), ("after", after)) if moment]
    return f"Nearest moments that can be reached {', '.join(nearest)}." if nearest else "`pitr window` shows what can."


def _written(wal_time: int | None) -> str:
    return "an unknown time" if wal_time is None else format_time(from_wal_time(wal_time))


def _numbers_by_timeline(held: Holdings) -> dict[int, set[int]]:
    numbers: dict[int, set[int]] = {}
    for name in held.segments:
        timeline, start_lsn = parse_segment_name(name, held.segment_bytes)
        numbers.setdefault(timeline, set()).add(start_lsn // held.segment_bytes)
    return numbers
