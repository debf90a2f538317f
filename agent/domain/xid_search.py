"""Finds where a transaction ended in archived WAL, by its id, reading as few segments as possible.

Ids are given in ascending order and most transactions end soon after, so the search halves its way to where ids as
great end. From there it reads on, then back, for a transaction may have run for long; it stops where checkpoints prove
that the transaction had ended (it is older than all that were running) or had not begun (its id was not given yet).

Source: CreateCheckPoint() in PostgreSQL's xlog.c; TransactionIdPrecedes() in transam.c: ids are compared modulo 2**32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.domain.wal_records import RecordKind, WalRecord
from agent.domain.wal_runs import WalRun
from agent.domain.wal_scan import RecordJoiner, SegmentScan
from agent.domain.wal_search import Rules, records_of, widening

_BLOCK = 4  # segments read at once, and one more to complete the last record


def precedes(one: int, other: int) -> bool:
    """Tell whether transaction id `one` was given before `other`; both modulo 2**32."""
    return (one - other) & 0xFFFFFFFF > 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class XidPlace:
    """Where a transaction ended: its record, or None.

    is_later: without a record, that its id was not given yet where the WAL ends.
    """

    record: WalRecord | None
    is_later: bool = False


def find_xid(run: WalRun, from_lsn: int, xid: int) -> Rules[XidPlace]:
    """Find the commit or abort of `xid` (modulo 2**32) in `run` from `from_lsn` on."""
    search = _XidSearch(run, from_lsn, xid)
    middle = yield from search.near()
    record = yield from search.read_on(middle)
    if record is None:
        record = yield from search.read_back(middle)
    return XidPlace(record, is_later=record is None and search.is_later)


class _XidSearch:
    """The state of one search: its end, if it is in the WAL at all, is in a segment from `_floor` to `_ceiling`."""

    def __init__(self, run: WalRun, from_lsn: int, xid: int) -> None:
        self._run = run
        self._from_lsn = from_lsn
        self._xid = xid
        self._floor = run.index(from_lsn)
        self._ceiling = len(run.segments) - 1
        self._has_begun = False

    @property
    def is_later(self) -> bool:
        """Whether nothing that was read is as late as the transaction."""
        return not self._has_begun

    def near(self) -> Rules[int]:
        """Return a segment near the first in which an id as great ended."""
        below, above = self._floor - 1, self._ceiling + 1
        while above - below > 1:
            middle = (below + above) // 2
            for index in (*widening(middle, above), *widening(middle - 1, below)):
                (scan,) = yield from records_of((self._run.segments[index],))
                self._learn(index, scan.records)
                if (newest := _newest_xid(scan)) is not None:
                    below, above = (index, above) if precedes(newest, self._xid) else (below, index)
                    break
            else:
                break
            below, above = max(below, self._floor - 1), min(above, self._ceiling + 1)
        return min(max(below + 1, self._floor), self._ceiling)

    def read_on(self, index: int) -> Rules[WalRecord | None]:
        """Read from segment `index` on until the end is found, or proven to be before."""
        start = max(index - 1, self._floor)
        while start <= self._ceiling:
            if record := (yield from self._read(start, start + _BLOCK)):
                return record
            start += _BLOCK
        return None

    def read_back(self, index: int) -> Rules[WalRecord | None]:
        """Read back from segment `index` until the end is found, or proven to be after."""
        stop = max(index - 1, self._floor)
        while stop > self._floor:
            if record := (yield from self._read(max(stop - _BLOCK, self._floor), stop)):
                return record
            stop -= _BLOCK
        return None

    def _read(self, start: int, stop: int) -> Rules[WalRecord | None]:
        scans = yield from records_of(self._run.segments[start : stop + 1])
        joiner = RecordJoiner()
        for index, scan in enumerate(scans, start):
            records = joiner.take(scan)
            self._learn(index, records)
            for record in records:
                if record.ends_transaction and record.xid == self._xid and record.lsn >= self._from_lsn:
                    return record
        return None

    def _learn(self, index: int, records: Sequence[WalRecord]) -> None:
        for record in records:
            if record.ends_transaction and not precedes(record.xid, self._xid):
                self._has_begun = True
            if record.kind is not RecordKind.CHECKPOINT or not record.next_xid:
                continue
            if not precedes(self._xid, record.next_xid):  # its id was not given at the redo point
                self._floor = max(self._floor, self._run.index(record.start_lsn))
            else:
                self._has_begun = True
                oldest = record.oldest_active_xid
                if oldest and precedes(self._xid, oldest):
                    self._ceiling = min(self._ceiling, index)


def _newest_xid(scan: SegmentScan) -> int | None:
    """Return the latest id that `scan` shows, None if it shows none."""
    newest: int | None = None
    for xid in _xids(scan):
        if newest is None or precedes(newest, xid):
            newest = xid
    return newest


def _xids(scan: SegmentScan) -> Iterator[int]:
    for record in scan.records:
        if record.ends_transaction and record.xid:
            yield record.xid
        elif record.kind is RecordKind.CHECKPOINT and record.next_xid:
            yield (record.next_xid - 1) & 0xFFFFFFFF
