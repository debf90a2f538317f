"""What a restore needs: which base backup, which WAL, and where replay stops; or why there is no way.

The rules decide; they read nothing. Where the answer is in the WAL itself, they ask (`agent.domain.wal_search`):
for the times of segments, which a HEAD tells, and for the records of a few. A transaction's id is found by halving,
too. Only the name of a restore point must be read for, from the base backup on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from agent.domain.archived_path import ArchivedPath, Holdings, Unfit, UnfitKind
from agent.domain.catalog import Backup
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import RestoreTarget, TargetKind, format_time
from agent.domain.timeline import history_name, timeline_at
from agent.domain.wal import segment_name
from agent.domain.wal_records import RecordKind, WalRecord, from_wal_time
from agent.domain.wal_runs import Hole, SegmentNames, WalRun
from agent.domain.wal_scan import RecordJoiner
from agent.domain.wal_search import Rules, first_beyond, first_match, last_moments, last_transaction, records_of
from agent.domain.window import RestorableRange, latest_timeline, restorable_ranges
from agent.domain.xid_search import XidPlace, find_xid
from agent.errors import NoRestorePath

# Metadata's finish time is taken after the backup's last record, up to seconds later; a clock is read on each side.
_FINISH_TIME_MARGIN = timedelta(seconds=5)
# Segments before a base backup that are searched for the last commit in it.
_LOOK_BACK_SEGMENTS = 4
# Segments read to find the very record at which the times pass a moment; beyond that only the last two of them.
_READ_WHOLE = 4


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How one target is reached.

    backup: the base backup that recovery begins from.
    chain: the base backups to hydrate, the full one first, `backup` last.
    target: what was asked for.
    effective_target: what PostgreSQL is to be told. Its timeline is a decimal number, or `current` if that timeline has
        no history file: PostgreSQL refuses the number then, and takes the base backup's own. It differs from `target`
        where PostgreSQL would refuse the target although nothing is missing, and where only a later timeline's first
        record is not before it; `note` then says so. Whatever is archived after the plan was made, it leads no further.
    timeline: the timeline that replay follows: recovery_target_timeline. If replay ends in the very segment in which
        the timeline that was asked for left it, before that, it may be an earlier one.
    segment_bytes: `wal_segment_size` of the archived WAL.
    segments: names of the WAL segments that replay reads, in order; none is missing.
    stop_lsn: start of the record that replay stops at or before, None if it runs to the end of the WAL or stops as soon
        as it is consistent.
    stop_commit_at: time of the transaction that ends at an inclusive LSN, None if there is none: PostgreSQL replays it,
        but does not name it as the last one. Source: recoveryStopsAfter() in xlogrecovery.c.
    download_bytes: what is downloaded, base backups and WAL, as stored.
    restored_bytes: what the base backups write, before compression.
    note: a sentence for the operator, or empty.
    ends_at_gap: the segment after the last one is missing though later WAL is there: reading ahead of the target would
        run into it.
    measured_rate: stored bytes that were read of this repository a second while the plan was made, one stream at a time
        as a rule; None if too few were.
    """

    backup: Backup
    chain: tuple[Backup, ...]
    target: RestoreTarget
    effective_target: RestoreTarget
    timeline: int
    segment_bytes: int
    segments: Sequence[str]
    stop_lsn: int | None = None
    stop_commit_at: datetime | None = None
    download_bytes: int = 0
    restored_bytes: int = 0
    note: str = ""
    ends_at_gap: bool = False
    measured_rate: float | None = None

    @property
    def download_seconds(self) -> float | None:
        """How long the download takes at most, at the rate measured with one stream; None if none was measured."""
        return None if self.measured_rate is None else self.download_bytes / self.measured_rate

    @property
    def disk_bytes(self) -> int:
        """What the base backup takes on disk, tablespaces included; WAL comes on top."""
        return self.backup.catalog_bytes or max(each.size_bytes for each in self.chain)

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

    One with corrupt pages is the last choice, for replay makes the same state from an older one without: only the state
    of a base backup itself (`IMMEDIATE`), and the first of several restore points of one name after it, depend on which
    it is, and are always those of the newest.

    Asks for what it has to know of segments, see `agent.domain.wal_search`.

    Raises:
        NoRestorePath: It cannot be reached. The message says why, the hint what can be.
    """
    named = [backup for backup in held.backups if backup_name in (None, backup.name)]
    if not named:
        raise NoRestorePath(
            f"there is no base backup {backup_name}" if held.backups else "the repository holds no base backup",
            hint="`pitr backup list` shows what there is."
            if held.backups
            else "Is it the right WALG_S3_PREFIX? If it is, take one: `pitr backup now`.",
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
        timeline = latest_timeline(held)
        # What ended before the oldest base backup cannot come from the way.
        oldest = min(backup.start_lsn for backup in held.backups) // held.segment_bytes
        beyond = max(
            (number for number, ranges in held.wal.items() if any(each.stop > oldest for each in ranges)),
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


@dataclass(frozen=True, slots=True)
class _Way:
    """How a base backup reaches the target: see the fields of `RestorePlan`.

    stop_end_lsn: where the record ends that replay stops at or before, or a place in that segment and on that timeline;
        None if neither is known.
    instead: what PostgreSQL is to be told instead of the target.
    """

    segments: SegmentNames
    stop_lsn: int | None = None
    stop_end_lsn: int | None = None
    stop_commit_at: datetime | None = None
    instead: RestoreTarget | None = None
    note: str = ""


class _Planner:
    """Plans for one target on one timeline."""

    def __init__(self, held: Holdings, target: RestoreTarget, backups: Sequence[Backup], timeline: int) -> None:
        self._held = held
        self._target = target
        self._timeline = timeline
        self._backups = backups
        self._path = ArchivedPath(held, timeline)
        # On one path the order of LSNs is the order in time, whatever clocks say.
        self._best_first = sorted(backups, key=lambda backup: backup.finish_lsn, reverse=True)
        if target.kind is not TargetKind.IMMEDIATE:
            self._best_first.sort(key=lambda backup: backup.corrupt_pages > 0)
        self._searched_from: int | None = None
        self._xids: dict[int, XidPlace] = {}  # by the start of the run
        self._found_at: int | None = None

    def plan(self) -> Rules[RestorePlan]:
        unfit: list[tuple[Backup, Unfit]] = []
        for backup in self._best_first:
            try:
                self._path.require_on_path(backup)
                chain = self._path.chain(backup)
                run = self._path.run_of(backup)
                way = yield from self._way(backup, run)
            except Unfit as reason:
                unfit.append((backup, reason))
                continue
            timeline = self._timeline
            if (earlier := self._before_fork(backup, way)) is not None:
                timeline, run = earlier
                segments = run.from_index(run.index(backup.start_lsn)).segments_to(way.stop_end_lsn or 0)
                note = f"replay ends before timeline {self._timeline} left timeline {timeline}, which it follows"
                way = replace(way, segments=segments, note=note)
            told = [way.note] if way.note else []
            told += [f"base backup {b.name} is not used: {r}" for b, r in unfit if r.kind is UnfitKind.BROKEN]
            told += self._corrupt_pages(backup)
            if backup.config_outside:
                told.append(f"not in the base backup: {', '.join(backup.config_outside)}")
            return RestorePlan(
                backup=backup,
                chain=chain,
                target=self._target,
                effective_target=replace(way.instead or self._target, timeline=self._recovery_target(timeline)),
                timeline=timeline,
                segment_bytes=self._held.segment_bytes,
                segments=way.segments,
                stop_lsn=way.stop_lsn,
                stop_commit_at=way.stop_commit_at,
                restored_bytes=sum(part.size_bytes for part in chain),
                note="; ".join([*told, *self._branches_left_out()]),
                ends_at_gap=run.hole is not None and way.segments[-1] == run.segments[-1],
            )
        raise (yield from self._refusal(unfit))

    def _corrupt_pages(self, chosen: Backup) -> list[str]:
        """Tell of corrupt pages in the chosen base backup, or in newer ones that would need less WAL."""
        if chosen.corrupt_pages:
            return [f"base backup {chosen.name} has {chosen.corrupt_pages} corrupt pages"]
        return [
            f"base backup {backup.name} is not used: it has {backup.corrupt_pages} corrupt pages"
            for backup in self._backups
            if backup.corrupt_pages and backup.finish_lsn > chosen.finish_lsn and self._path.serves(backup)
        ]

    def _branches_left_out(self) -> list[str]:
        """Say which timelines with WAL `latest` passes over: a clone may have archived here, and be the latest."""
        if self._target.timeline != "latest":
            return []
        on_path = {stretch.timeline for stretch in self._path.stretches}
        left_at = {number: self._held.histories[number][-1:] for number in self._held.histories}
        others = [
            f"timeline {number}, which left timeline {fork.timeline} at {format_lsn(fork.switch_lsn)}"
            for number in sorted(self._held.wal)
            for fork in left_at.get(number, ())
            if number not in on_path
        ]
        return [f"the latest timeline, {self._timeline}, does not come from {' and '.join(others)}"] if others else []

    def _before_fork(self, backup: Backup, way: _Way) -> tuple[int, WalRun] | None:
        """Return the timeline on which replay ends, with its WAL, if what is to be read last is a later one's copy.

        At its end recovery looks for prepared transactions that are in doubt in the segment as the timeline has it that
        was replayed last. If that was not restored, for the later copy was, it gives up.
        Source: XlogReadTwoPhaseData() in PostgreSQL's twophase.c, XLogReadDetermineTimeline() in xlogutils.c.

        None also if the earlier timeline's copy is not archived: without prepared transactions it is not needed.
        """
        if way.stop_end_lsn is None:
            return None
        last = way.stop_end_lsn - 1
        timeline = timeline_at(self._path.stretches, last)
        if way.segments[-1] == segment_name(timeline, last, self._held.segment_bytes):
            return None
        try:
            run = ArchivedPath(self._held, timeline).run_of(backup)
        except Unfit:
            return None
        return (timeline, run) if run.holds(backup.start_lsn, way.stop_end_lsn) else None

    def _recovery_target(self, timeline: int) -> str:
        """Source: validateRecoveryParameters() in PostgreSQL's xlogrecovery.c (13, 14: xlog.c)."""
        has_history = timeline == 1 or timeline in self._held.histories
        return str(timeline) if has_history else "current"

    def _way(self, backup: Backup, run: WalRun) -> Rules[_Way]:
        wal = run.from_index(run.index(backup.start_lsn))
        match self._target.kind:
            case TargetKind.IMMEDIATE:
                return _Way(wal.segments_to(backup.finish_lsn), stop_end_lsn=backup.finish_lsn)
            case TargetKind.END_OF_WAL:
                _require_no_hole(wal)
                return _Way(wal.segments)
            case TargetKind.TIME:
                return (yield from self._to_time(backup, wal))
            case TargetKind.LSN:
                return (yield from self._to_lsn(backup, wal))
            case TargetKind.XID:
                return (yield from self._to_xid(backup, run))
            case TargetKind.NAME:
                return (yield from self._to_name(backup, wal))

    def _to_time(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        moment = self._target.time
        assert moment is not None
        yield from self._require_complete_by(backup, moment)
        first = wal.index(backup.finish_lsn - 1)
        last = yield from last_transaction(wal, first)
        wal = last.reach
        known = wal.index(last.end.lsn) if last.end is not None and self._is_beyond(last.end.time) else None
        place = yield from first_beyond(wal, first, self._is_beyond, known)
        if place is not None:
            return _way_to(wal, (yield from self._record_beyond(backup, wal, first, *place)))
        is_after = last.end is not None and last.end.lsn >= backup.start_lsn
        return (yield from self._to_idle_time(backup, wal, moment, last.end.time if last.end and is_after else None))

    def _to_idle_time(self, backup: Backup, wal: WalRun, moment: datetime, last: datetime | None) -> Rules[_Way]:
        """Plan for a moment after the last transaction: the rest of the WAL must show that there was none up to it.

        What replay does not read shows nothing: before the base backup the clock may have been ahead.
        """
        end = yield from last_moments(wal, wal.end_lsn, need_transaction=False, from_lsn=backup.start_lsn)
        wal = end.reach
        if end.transaction is not None and self._is_beyond(from_wal_time(end.transaction)):  # over two segments
            begin = max(wal.start_lsn + end.from_index * wal.segment_bytes, backup.start_lsn)
            record = yield from first_match(wal, begin, wal.end_lsn, self._ends_beyond)
            if record is not None:
                return _way_to(wal, record)
        times = [*([] if last is None else [last]), *([] if end.anything is None else [from_wal_time(end.anything)])]
        if times and max(times) >= moment:
            # PostgreSQL knows a time by transactions only. Without any target it would replay what is archived later.
            assert end.last_lsn is not None
            stop_commit_at = yield from _transaction_at(wal, end.last_lsn)
            until = "the end of the WAL archived by now" if wal.hole is None else f"where {wal.hole}"
            return _Way(
                wal.segments,
                stop_lsn=end.last_lsn,
                stop_commit_at=stop_commit_at,
                instead=RestoreTarget(TargetKind.LSN, lsn=end.last_lsn),
                note=f"no transaction ended after {format_time(moment)}: replay goes to {until}, "
                f"LSN {format_lsn(end.last_lsn)}",
            )
        shown = f" after {format_time(max(times))}" if times else ""
        raise Unfit(f"the archived WAL shows nothing{shown}" + _because(wal.hole), UnfitKind.NOT_SHOWN)

    def _is_beyond(self, time: datetime) -> bool:
        """Tell whether a transaction that ended at `time` is after the target, so that replay stops before it.

        Source: recoveryStopsBefore() in PostgreSQL's src/backend/access/transam/xlogrecovery.c.
        """
        assert self._target.time is not None
        return time > self._target.time if self._target.inclusive else time >= self._target.time

    def _ends_beyond(self, record: WalRecord) -> bool:
        return record.ends_transaction and record.time is not None and self._is_beyond(record.time)

    def _require_complete_by(self, backup: Backup, moment: datetime) -> Rules[None]:
        """Return if the backup holds no transaction after `moment`.

        PostgreSQL does not always notice such a target: with no transaction between start and end of the backup it
        would open with everything the backup holds. The metadata's finish time may be later than the true end, so
        close to it the last transaction in the backup decides.
        """
        if moment >= backup.finish_time + _FINISH_TIME_MARGIN:
            return
        too_early = Unfit(f"it was complete only at {format_time(backup.finish_time)}", UnfitKind.TOO_EARLY)
        if moment < backup.start_time:
            raise too_early
        last = yield from self._last_transaction_before(backup)
        if self._is_beyond(last) if last is not None else moment < backup.finish_time:
            raise too_early

    def _last_transaction_before(self, backup: Backup) -> Rules[datetime | None]:
        """Return when the last transaction before the backup's end ended, None if the WAL nearby does not say."""
        run = self._path.run_of(backup)
        first = max(0, run.index(backup.start_lsn) - _LOOK_BACK_SEGMENTS)
        last = yield from last_moments(run.from_index(first), backup.finish_lsn, need_transaction=True)
        return None if last.transaction is None else from_wal_time(last.transaction)

    def _record_beyond(self, backup: Backup, wal: WalRun, first: int, below: int, above: int) -> Rules[WalRecord]:
        """Return the record that replay stops before, in or shortly before segment `above`.

        A commit that goes on from one segment into the next may be passed over if many segments without any lie before
        `above`: then replay stops earlier than the plan says.
        """
        begin = max(below if above - below <= _READ_WHOLE else above - 1, first)
        begin_lsn = max(wal.start_lsn + begin * wal.segment_bytes, backup.start_lsn)
        record = yield from first_match(wal, begin_lsn, wal.end_lsn, self._ends_beyond, likely_in=above)
        if record is None:
            if above == first:  # the segment that the base backup ends in
                raise Unfit("only WAL before it shows the target: the clock was set back", UnfitKind.NOT_SHOWN)
            raise Unfit("the WAL after it is damaged before the target")
        if record.lsn < backup.finish_lsn:
            assert record.time is not None
            raise Unfit(f"a transaction in it ended at {format_time(record.time)}", UnfitKind.TOO_EARLY)
        return record

    def _to_lsn(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        """Replay stops at the first record that begins at the target or after it, so there must be one.

        Source: recoveryStopsBefore() and recoveryStopsAfter() in xlogrecovery.c.
        """
        lsn = self._target.lsn
        assert lsn is not None
        if lsn < backup.finish_lsn:
            raise Unfit(f"it was complete only at {format_lsn(backup.finish_lsn)}", UnfitKind.TOO_EARLY)
        joiner = RecordJoiner()
        for index in range(wal.index(lsn), len(wal.segments)):
            (scan,) = yield from records_of((wal.segments[index],))
            at_or_after = [record for record in joiner.take(scan) if record.lsn >= lsn]
            if joiner.last_lsn is not None and joiner.last_lsn >= lsn:
                way = _Way(wal.segments[: index + 1], stop_lsn=lsn)
                if not at_or_after:
                    return way
                record = at_or_after[0]
                if record.previous_lsn >= lsn:
                    # Replay stops at another one, of no interest, which is of the timeline that this one follows.
                    begin_lsn = wal.start_lsn + index * wal.segment_bytes
                    return replace(way, stop_end_lsn=max(record.previous_lsn, begin_lsn) + 1)
                fork_lsn = self._left_at(record.previous_lsn)
                if not self._target.inclusive and fork_lsn is not None and record.lsn >= fork_lsn:
                    return (yield from self._to_last_of_timeline(wal, record.previous_lsn, fork_lsn))
                is_replayed = self._target.inclusive and record.ends_transaction
                return replace(way, stop_end_lsn=record.end_lsn, stop_commit_at=record.time if is_replayed else None)
            if joiner.ended:
                break
        raise Unfit("no record in the archived WAL begins there or later" + _because(wal.hole), UnfitKind.NOT_SHOWN)

    def _left_at(self, lsn: int) -> int | None:
        """Return where the path leaves the timeline that it follows at `lsn`, None if it does not."""
        return next(each.to_lsn for each in reversed(self._path.stretches) if each.from_lsn <= lsn)

    def _to_last_of_timeline(self, wal: WalRun, lsn: int, fork_lsn: int) -> Rules[_Way]:
        """Plan for the end of the record at `lsn`, the last one before a fork: its timeline may have no other."""
        stop_commit_at = yield from _transaction_at(wal, lsn)
        return _Way(
            wal.segments_to(fork_lsn),
            stop_lsn=lsn,
            stop_end_lsn=fork_lsn,
            stop_commit_at=stop_commit_at,
            instead=RestoreTarget(TargetKind.LSN, lsn=lsn),
            note=f"replay ends where timeline {timeline_at(self._path.stretches, lsn)} was left",
        )

    def _to_xid(self, backup: Backup, run: WalRun) -> Rules[_Way]:
        """An id is given once, so one search serves all base backups before the same WAL."""
        if run.start_lsn not in self._xids:
            assert self._target.xid is not None
            inside = [each.start_lsn for each in self._backups if run.holds(each.start_lsn, each.finish_lsn)]
            xid = self._target.xid & 0xFFFFFFFF  # WAL holds no epoch
            self._xids[run.start_lsn] = yield from find_xid(run, min(inside), xid)
        return self._way_to_found(self._xids[run.start_lsn].record, backup, run)

    def _to_name(self, backup: Backup, wal: WalRun) -> Rules[_Way]:
        """Replay stops at the first match after the base backup's start, even if another follows."""
        searched = self._searched_from
        until = wal.end_lsn if searched is None or searched < backup.start_lsn else searched
        record = yield from first_match(wal, backup.start_lsn, until, self._is_named_point)
        if record is None:
            self._searched_from = backup.start_lsn
        elif not backup.corrupt_pages:
            yield from self._require_last_named(record)
        return self._way_to_found(record, backup, wal)

    def _require_last_named(self, point: WalRecord) -> Rules[None]:
        """Return if no base backup after `point`, passed over for its corrupt pages, leads to another such point."""
        for newer in self._backups:
            if newer.corrupt_pages and newer.start_lsn > point.lsn and self._path.serves(newer):
                run = self._path.run_of(newer)
                other = yield from first_match(run, newer.start_lsn, run.end_lsn, self._is_named_point)
                if other is not None and other.lsn >= newer.finish_lsn:
                    where = f"{format_lsn(other.lsn)} has that name, too, after base backup {newer.name}"
                    raise Unfit(f"the restore point at {where}", UnfitKind.TOO_EARLY)

    def _is_named_point(self, record: WalRecord) -> bool:
        return record.kind is RecordKind.RESTORE_POINT and record.name == self._target.name

    def _way_to_found(self, record: WalRecord | None, backup: Backup, run: WalRun) -> _Way:
        if record is None:
            reason = "the WAL archived after it does not show the target" + _because(run.hole)
            raise Unfit(reason, UnfitKind.NOT_SHOWN, names_gap=run.hole is not None)
        self._found_at = record.lsn
        if record.lsn < backup.finish_lsn:
            raise Unfit(f"the target, at {format_lsn(record.lsn)}, is before its end", UnfitKind.TOO_EARLY)
        return _way_to(run.from_index(run.index(backup.start_lsn)), record)

    def _refusal(self, unfit: Sequence[tuple[Backup, Unfit]]) -> Rules[NoRestorePath]:
        explains = {kind: [pair for pair in unfit if pair[1].kind is kind] for kind in UnfitKind}
        explains[UnfitKind.TOO_EARLY].sort(key=lambda pair: pair[0].finish_lsn)  # of the oldest: the others are later
        explains[UnfitKind.NOT_SHOWN].sort(key=lambda pair: not pair[1].names_gap)
        backup, reason = next(pairs[0] for pairs in explains.values() if pairs)
        ranges = yield from restorable_ranges(self._path, self._backups)
        before, after = self._nearest(ranges)
        return NoRestorePath(
            f"{self._target} cannot be reached on timeline {self._timeline} from base backup {backup.name}: {reason}",
            hint=" ".join([_hint(before, after), *self._where_else(backup, reason)]),
            nearest_before=before,
            nearest_after=after,
        )

    def _where_else(self, backup: Backup, reason: Unfit) -> list[str]:
        """Say where a target may be that the WAL of this timeline, which has no gap, does not show."""
        if reason.kind is not UnfitKind.NOT_SHOWN or self._path.run_of(backup).hole is not None:
            return []
        others = sorted({*self._held.wal} - {self._timeline})
        told = ["If the server runs, SELECT pg_switch_wal() has it archive what it wrote last; then ask again."]
        if self._target.timeline == "latest" and others:
            told.append(
                f"Other timelines have WAL, too: set TARGET_TIMELINE to {' or '.join(map(str, others))} to look there."
            )
        return told

    def _nearest(self, ranges: Sequence[RestorableRange]) -> tuple[datetime | None, datetime | None]:
        """Return the nearest moments before and after the target that can be reached."""
        before = [each.to_time for each in ranges if not each.is_one_state and self._is_after(each)]
        after = [each.from_time for each in ranges if not each.is_one_state and self._is_before(each)]
        return max(before, default=None), min(after, default=None)

    def _is_after(self, each: RestorableRange) -> bool:
        """Tell whether the target comes after the range, as far as that is known."""
        if self._target.time is not None:
            return each.to_time <= self._target.time
        lsn = self._lsn_asked_for()
        if lsn is not None:
            return each.to_lsn <= lsn
        place = next((place for start, place in self._xids.items() if start <= each.from_lsn), None)
        return place is None or place.is_later

    def _is_before(self, each: RestorableRange) -> bool:
        if self._target.time is not None:
            return each.from_time > self._target.time
        lsn = self._lsn_asked_for()
        return lsn is not None and each.from_lsn > lsn

    def _lsn_asked_for(self) -> int | None:
        return self._target.lsn if self._target.lsn is not None else self._found_at


def _transaction_at(wal: WalRun, lsn: int) -> Rules[datetime | None]:
    """Return the time of the transaction whose end is the record at `lsn`, None if it is another record."""
    record = yield from first_match(wal, lsn, lsn + 1, lambda each: each.ends_transaction)
    return None if record is None else record.time


def _way_to(wal: WalRun, record: WalRecord) -> _Way:
    return _Way(wal.segments_to(record.end_lsn), stop_lsn=record.lsn, stop_end_lsn=record.end_lsn)


def _require_no_hole(wal: WalRun) -> None:
    if wal.hole is not None:
        raise Unfit(f"{wal.hole}, though WAL after that is there")


def _because(hole: Hole | None) -> str:
    return f": {hole}, though WAL after that is there" if hole else ""


def _hint(before: datetime | None, after: datetime | None) -> str:
    nearest = [
        f"{format_time(moment)} ({word} it)" for word, moment in (("before", before), ("after", after)) if moment
    ]
    if not nearest:
        return "`pitr window` shows what can be."
    return f"Nearest moments that can be reached: {' and '.join(nearest)}."
