"""Finds places in archived WAL, looking at as few segments as possible.

The rules decide; they read nothing. They are generators that yield a question about segments, are sent the answer, and
return what they found:

    rules = last_transaction(run)
    question = next(rules)
    while True: question = rules.send(answer(question))     # until StopIteration, whose value is the result

`TimesOf` is the cheap question: a HEAD of a segment with our metadata. `RecordsOf` makes somebody download it.

Assumed of the clock: transactions end in the order of their times. Where it was set back the order of the WAL counts,
as it does for PostgreSQL: what is searched for is one place where the times pass a moment, with the last transaction
before it not beyond. There may be an earlier such place, at which replay then stops; the WAL up to the one that is
found is enough in any case. Segments in which no transaction ends tell nothing and are passed over.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias, TypeVar

from agent.domain.wal_records import LIMITS, RecordKind, WalRecord
from agent.domain.wal_runs import WalRun
from agent.domain.wal_scan import RecordJoiner, SegmentScan
from agent.domain.wal_times import SegmentTimes, TransactionEnd

_T = TypeVar("_T")

_MOST_AT_ONCE = 64  # segments asked for their times in one question
_RECORDS_AT_ONCE = 4  # segments to be downloaded in one question, where all must be read
_SPAN_READ_WHOLE = 4  # segments around a place that are all read to find the very record


@dataclass(frozen=True, slots=True)
class TimesOf:
    """Asks when transactions ended in each of the segments: `SegmentTimes`, None where that is not certain."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecordsOf:
    """Asks for the records of each of the segments: `SegmentScan`."""

    names: tuple[str, ...]


Question: TypeAlias = TimesOf | RecordsOf
Answer: TypeAlias = Sequence[SegmentScan | SegmentTimes | None]
Rules: TypeAlias = Generator[Question, Answer, _T]


@dataclass(frozen=True, slots=True)
class SegmentEnds:
    """The first and last transaction that ended in a segment; `is_whole`: its WAL goes on to its end."""

    first: TransactionEnd | None
    last: TransactionEnd | None
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class LastMoments:
    """What the end of a run of WAL shows.

    transaction, anything: time (WAL's) of the last transaction that ended, and of the last record with a time.
    last_lsn: start of the last record that was seen, of any kind; at or after those two.
    reach: the run, up to damage that was seen on the way.
    from_index: the first segment that was read.
    """

    transaction: int | None
    anything: int | None
    last_lsn: int | None
    reach: WalRun
    from_index: int


@dataclass(frozen=True, slots=True)
class LastTransaction:
    """The last transaction that ends in a run, None if none does, and the run, up to damage that was seen."""

    end: TransactionEnd | None
    reach: WalRun


def records_of(names: Sequence[str]) -> Rules[list[SegmentScan]]:
    """Ask for the records of segments."""
    answer = yield RecordsOf(tuple(names))
    return [scan for scan in answer if isinstance(scan, SegmentScan)]


def ends_of(names: Sequence[str]) -> Rules[list[SegmentEnds]]:
    """Ask when transactions ended in segments; those that are not certain of their times are read."""
    answer = yield TimesOf(tuple(names))
    ends: list[SegmentEnds] = []
    for name, times in zip(names, answer, strict=True):
        if isinstance(times, SegmentTimes):
            ends.append(SegmentEnds(times.first, times.last))
        else:
            (scan,) = yield from records_of((name,))
            ends.append(_ends_in(scan))
    return ends


def _ends_in(scan: SegmentScan) -> SegmentEnds:
    ended = [TransactionEnd(r.lsn, r.time) for r in scan.records if r.ends_transaction and r.time is not None]
    return SegmentEnds(ended[0] if ended else None, ended[-1] if ended else None, scan.is_whole)


def last_transaction(run: WalRun, from_index: int = 0) -> Rules[LastTransaction]:
    """Find the last transaction that ends in the segments of `run` from `from_index` on, from the end backwards.

    One whose record goes on in the next segment does not count, see `SegmentTimes`.
    """
    stop, width = len(run.segments), 1
    while stop > from_index:
        start = max(from_index, stop - width)
        ends = yield from ends_of(run.segments[start:stop])
        for index in range(stop - 1, start - 1, -1):
            end = ends[index - start]
            if not end.is_whole and index < len(run.segments) - 1:
                run = run.broken_at(index)
        last = next((e.last for e in reversed(ends[: len(run.segments) - start]) if e.last is not None), None)
        if last is not None:
            return LastTransaction(last, run)
        stop, width = start, min(2 * width, _MOST_AT_ONCE)
    return LastTransaction(None, run)


def first_beyond(
    run: WalRun, from_index: int, beyond: Callable[[datetime], bool], known_beyond: int | None
) -> Rules[tuple[int, int] | None]:
    """Find two segments, by index: in the first no transaction ended beyond, in the second the first one after it did.

    Between them are only segments in which none ended, as far as was looked: of a very long stretch of them samples,
    and those at its ends. The first may be `from_index` - 1.

    Args:
        run: The WAL.
        from_index: The segment to begin at.
        beyond: Tells of a transaction's time whether it is beyond what is looked for.
        known_beyond: Index of a segment in which one ended beyond, None: there may be none.
    """
    below, above = from_index - 1, known_beyond
    if above is None and (above := (yield from _any_beyond(run, from_index, beyond))) is None:
        return None
    while above - below > _SPAN_READ_WHOLE:
        middle = (below + above) // 2
        around = [*widening(middle, above), *widening(middle - 1, below)]
        near_ends = [*reversed(widening(above - 1, below)), *reversed(widening(below + 1, above))]
        found = yield from _some_time(run, [*around, *near_ends])
        if found is None:
            break
        if beyond(found[1]):
            above = found[0]
        else:
            below = found[0]
    return (yield from _narrowed(run, below, above, beyond))


def _some_time(run: WalRun, indexes: Sequence[int]) -> Rules[tuple[int, datetime] | None]:
    """Return the first of the segments in which a transaction ended, and when the last one in it did.

    Asked for a growing number at a time: mostly the first one tells; where many do not, round trips count.
    """
    start, width = 0, 1
    while start < len(indexes):
        some = indexes[start : start + width]
        ends = yield from ends_of([run.segments[index] for index in some])
        for index, each in zip(some, ends, strict=True):
            if each.last is not None:
                return index, each.last.time
        start, width = start + width, 2 * width
    return None


def _any_beyond(run: WalRun, from_index: int, beyond: Callable[[datetime], bool]) -> Rules[int | None]:
    """Look back from the end in growing steps: the clock may have been set back since."""
    last = len(run.segments) - 1
    indexes = [index for index in (last - (1 << step) for step in range(last.bit_length())) if index >= from_index]
    ends = yield from ends_of([run.segments[index] for index in indexes])
    return next((i for i, e in zip(indexes, ends, strict=True) if e.last is not None and beyond(e.last.time)), None)


def widening(start: int, stop: int) -> list[int]:
    """Return indexes from `start` towards `stop`, which is left out, in growing steps: where else to look."""
    direction = 1 if stop > start else -1
    result, step = [], 1
    while start != stop and (stop - start) * direction > 0:
        result.append(start)
        start += step * direction
        step *= 2
    return result


def _narrowed(run: WalRun, below: int, above: int, beyond: Callable[[datetime], bool]) -> Rules[tuple[int, int]]:
    """Look at every segment next to `above`, then next to `below`: those in between were sampled, and tell nothing."""
    before = range(above - 1, max(below, above - 1 - _MOST_AT_ONCE), -1)
    ends = yield from ends_of([run.segments[index] for index in before])
    for index, each in zip(before, ends, strict=True):
        if each.last is not None and not beyond(each.last.time):
            return index, above
        above = above if each.last is None else index
    after = range(below + 1, min(above, below + 1 + _MOST_AT_ONCE))
    ends = yield from ends_of([run.segments[index] for index in after])
    for index, each in zip(after, ends, strict=True):
        if each.last is not None and beyond(each.last.time):
            return below, index
        below = below if each.last is None else index
    return below, above


def last_moments(run: WalRun, until_lsn: int, *, need_transaction: bool, from_lsn: int = 0) -> Rules[LastMoments]:
    """Read backwards from `until_lsn` until a record with a time, or a transaction's end, is found before it.

    What begins before `from_lsn` does not count.
    """
    transaction: int | None = None
    anything: int | None = None
    last_lsn: int | None = None
    later: list[SegmentScan] = []
    index = run.index(until_lsn - 1) + 1
    while index > 0:
        index -= 1
        (scan,) = yield from records_of((run.segments[index],))
        if later and not scan.is_whole:
            run, later, anything, last_lsn = run.broken_at(index), [], None, None
        joiner = RecordJoiner()
        records = [
            r for joined in (scan, *later) for r in joiner.take(joined) if from_lsn <= r.lsn < r.end_lsn <= until_lsn
        ]
        last_lsn = joiner.last_lsn if last_lsn is None else last_lsn
        timed = [(r.ends_transaction, r.wal_time) for r in records if r.wal_time is not None]
        anything = max([*(time for _, time in timed), *([] if anything is None else [anything])], default=None)
        transaction = max((time for ends, time in timed if ends), default=None)
        # A record that began in the segment before may be another one's end.
        is_enough = anything is not None and not scan.remaining and not need_transaction
        if transaction is not None or is_enough:
            break
        later = [scan]
    return LastMoments(transaction, anything, last_lsn, run, index)


def highest_limits(names: Sequence[str], highest: dict[str, int], read: Callable[[int], None]) -> Rules[None]:
    """Enter in `highest` the highest value of each of a server's `LIMITS` that consecutive segments announce.

    What they announce is there as far as they were read, also if one of them cannot be. `read` is told again and again
    how many of the segments have been.
    """
    joiner = RecordJoiner()
    for index in range(0, len(names), _RECORDS_AT_ONCE):
        scans = yield from records_of(names[index : index + _RECORDS_AT_ONCE])
        for record in (record for scan in scans for record in joiner.take(scan)):
            for name, value in zip(LIMITS, record.limits, strict=False):
                highest[name] = max(value, highest.get(name, 0))
        read(index + len(scans))


def tablespaces_made(
    names: Sequence[str], from_lsn: int, until_lsn: int, *, inclusive: bool = False
) -> Rules[list[str]]:
    """Return the directories of the tablespaces that are made between the two LSNs, in consecutive segments.

    inclusive: with the first record that begins at `until_lsn` or later, as replay to an inclusive LSN.
    """
    joiner, made = RecordJoiner(), list[str]()
    for index in range(0, len(names), _RECORDS_AT_ONCE):
        scans = yield from records_of(names[index : index + _RECORDS_AT_ONCE])
        for record in (record for scan in scans for record in joiner.take(scan)):
            before_lsn = record.previous_lsn if inclusive else record.lsn
            if record.kind is RecordKind.TABLESPACE and from_lsn <= record.lsn and before_lsn < until_lsn:
                made.append(record.name)
    return made


def first_match(
    run: WalRun, from_lsn: int, until_lsn: int, matches: Callable[[WalRecord], bool], *, likely_in: int | None = None
) -> Rules[WalRecord | None]:
    """Read on from `from_lsn`; return the first matching record that begins before `until_lsn`, or None.

    `likely_in`: index of the segment that is expected to hold it; those after that are left alone at first.
    """
    joiner = RecordJoiner()
    index = run.index(from_lsn)
    while index < len(run.segments):
        stop = index + _RECORDS_AT_ONCE
        if likely_in is not None and index <= likely_in:
            stop = min(stop, likely_in + 1)
        scans = yield from records_of(run.segments[index:stop])
        index = stop
        for record in (record for scan in scans for record in joiner.take(scan)):
            if record.lsn >= until_lsn:
                return None
            if record.lsn >= from_lsn and matches(record):
                return record
        if joiner.ended:
            break
    return None
