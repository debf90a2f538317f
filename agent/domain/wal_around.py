"""Which archived WAL shows the transactions that ended near a moment, and which of them are worth showing.

`segments_around` is a generator of questions, see `agent.domain.wal_search`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from agent.domain.archived_path import ArchivedPath
from agent.domain.transactions import EndedTransaction
from agent.domain.wal_runs import Hole, WalRun
from agent.domain.wal_search import Rules, first_beyond, last_transaction


@dataclass(frozen=True, slots=True)
class Around:
    """A moment and the stretch of time around it. All aware, UTC."""

    moment: datetime
    begin: datetime
    end: datetime

    def holds(self, time: datetime) -> bool:
        """Tell whether `time` is within, bounds included."""
        return self.begin <= time <= self.end


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive segments of WAL to be read.

    is_cut: there are more that show the stretch of time; these are the ones nearest to the moment.
    hole_before, hole_after: what is missing just before the first or after the last of them, None if nothing is.
    """

    names: Sequence[str]
    is_cut: bool
    hole_before: Hole | None
    hole_after: Hole | None


def segments_around(path: ArchivedPath, around: Around, most: int) -> Rules[Span | None]:
    """Find the segments in which the transactions of the stretch ended, `most` of them at most.

    With them come the last transaction before the stretch and the first one after it, as far as there are any. None if
    all that is archived ended before the stretch.
    """
    hole = None
    for run in path.runs:
        place = yield from _first_beyond(run, 0, lambda time: time >= around.begin)
        if place is not None:
            start = max(place[0], 0)
            stop = yield from _stop(run, start, around.end)
            span = range(start, stop)
            if len(span) > most:
                middle = (yield from _stop(run, start, around.moment)) - 1
                start = min(max(start, middle - most // 2), stop - most)
                stop = start + most
            return Span(
                run.segments[start:stop],
                is_cut=len(span) > most,
                hole_before=None if start else hole,
                hole_after=run.hole if stop == len(run.segments) else None,
            )
        hole = run.hole
    return None


def _stop(run: WalRun, start: int, moment: datetime) -> Rules[int]:
    """Return the index after that of the first segment in which a transaction ended after `moment`."""
    place = yield from _first_beyond(run, start, lambda time: time > moment)
    return len(run.segments) if place is None else place[1] + 1


def _first_beyond(run: WalRun, start: int, beyond: Callable[[datetime], bool]) -> Rules[tuple[int, int] | None]:
    last = (yield from last_transaction(run, start)).end
    known = run.index(last.lsn) if last is not None and beyond(last.time) else None
    return (yield from first_beyond(run, start, beyond, known))


def last_time(path: ArchivedPath) -> Rules[datetime | None]:
    """Return when the last transaction that the archived WAL shows ended."""
    for run in reversed(path.runs):
        last = (yield from last_transaction(run)).end
        if last is not None:
            return last.time
    return None


class Nearest:
    """Keeps the transactions of a stretch of time that matter most: those that stand out, then the nearest ones.

    before, after: the nearest transactions that ended before and after the stretch.
    left_out: how many of the stretch were not kept.
    """

    def __init__(self, around: Around, most: int) -> None:
        self.before: EndedTransaction | None = None
        self.after: EndedTransaction | None = None
        self.left_out = 0
        self._around = around
        self._most = most
        self._kept: list[EndedTransaction] = []

    def add(self, ended: EndedTransaction) -> None:
        """Look at one transaction; they come in the order of WAL."""
        if self._around.holds(ended.time):
            self._kept.append(ended)
            if len(self._kept) > 4 * self._most:  # memory is bounded
                self._prune()
        elif ended.time < self._around.begin:
            self.before = ended
        elif self.after is None:
            self.after = ended

    def kept(self) -> list[EndedTransaction]:
        """Return them in the order of WAL."""
        self._prune()
        return sorted(self._kept, key=lambda ended: ended.lsn)

    def _prune(self) -> None:
        self._kept.sort(key=lambda ended: (ended.rank, abs(ended.time - self._around.moment)))
        self.left_out += len(self._kept[self._most :])
        del self._kept[self._most :]
