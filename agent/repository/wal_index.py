"""What the archived WAL says of itself: asked with a HEAD where our metadata tells, read where it does not.

`WalIndex.follow` answers the questions of the rules in `agent.domain`. What was learned of a segment holds for ever,
for none is replaced; times are kept, records and contents only of the last few segments.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agent.domain.archived_path import Holdings
from agent.domain.catalog import Backup
from agent.domain.wal import WalFileKind
from agent.domain.wal_runs import ranges_by_timeline
from agent.domain.wal_scan import SegmentScan, scan_segment
from agent.domain.wal_search import Answer, Question, Rules, TimesOf
from agent.domain.wal_times import SegmentTimes, segment_times
from agent.errors import RepositoryCorrupt
from agent.repository.wal_archive import WalArchive, gone
from agent.tasks import in_thread, task_group

_HEADS_AT_ONCE = 16
_KEPT_TIMES = 20_000  # some 300 bytes each
_TELLING_BYTES = 4 << 20  # downloads that are smaller measure round trips
_KEPT_SCANS = 8  # the rules look at the end of the WAL more than once
_WHOLE_BYTES = 32 << 20  # of larger segments the times are read out of a file
_BUFFER_BYTES = 128 << 20  # of segments: a few are kept, and one that is scanned is held twice

_T = TypeVar("_T")
_V = TypeVar("_V")


class _Recent(Generic[_V]):
    """The last few things asked for, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: OrderedDict[str, _V] = OrderedDict()

    def get(self, name: str) -> _V | None:
        if name in self._items:
            self._items.move_to_end(name)
        return self._items.get(name)

    def put(self, name: str, item: _V) -> None:
        self._items[name] = item
        while len(self._items) > self._most:
            self._items.popitem(last=False)


class WalIndex:
    """Answers questions about the segments of one repository. One may serve many searches."""

    def __init__(self, archive: WalArchive, system_identifier: int | None, segment_bytes: int) -> None:
        """Make it; nothing is asked yet.

        Args:
            archive: The WAL part of the repository.
            system_identifier: The database cluster that the segments must be of; None accepts any.
            segment_bytes: `wal_segment_size`: decides how many are read at once.
        """
        self._archive = archive
        self._system_identifier = system_identifier
        self._is_large = segment_bytes > _WHOLE_BYTES
        at_once = max(1, _BUFFER_BYTES // (4 * segment_bytes)) if segment_bytes else 1
        self._reads = asyncio.Semaphore(min(at_once, _KEPT_SCANS))
        self._heads = asyncio.Semaphore(_HEADS_AT_ONCE)
        self._times: _Recent[tuple[SegmentTimes | None]] = _Recent(_KEPT_TIMES)
        self._scans: _Recent[SegmentScan] = _Recent(_KEPT_SCANS)
        self._contents: _Recent[bytes] = _Recent(min(at_once, 2))
        self.fetched: dict[str, float] = {}
        """Name of each segment that was downloaded, to the seconds that the last download of it took."""

    async def follow(self, rules: Rules[_T]) -> _T:
        """Answer the questions of `rules`; return what they return.

        Raises:
            RepositoryError: A segment could not be read, or is damaged; and what `rules` raise.
        """
        try:
            question = next(rules)
            while True:
                question = rules.send(await self._answer(question))
        except StopIteration as end:
            found: _T = end.value
            return found

    async def _answer(self, question: Question) -> Answer:
        ask: Callable[[str], Coroutine[None, None, SegmentScan | SegmentTimes | None]]
        ask = self._times_of if isinstance(question, TimesOf) else self._scan_of
        async with task_group() as group:
            tasks = [group.create_task(ask(name), name=f"look at {name}") for name in question.names]
        return [task.result() for task in tasks]

    async def _times_of(self, name: str) -> SegmentTimes | None:
        known = self._times.get(name)
        if known is None:
            async with self._heads:
                times = await self._archive.times(name)
            if times is None:
                async with self._reads:
                    times = await self._read_times(name)
            known = (times,)
            self._times.put(name, known)
        return known[0]

    async def _read_times(self, name: str) -> SegmentTimes | None:
        if not self._is_large:
            return await in_thread(segment_times, await self._content_of(name))
        begun = time.perf_counter()
        times = await self._archive.read_times(name, self._system_identifier)
        self.fetched[name] = time.perf_counter() - begun
        return times

    async def _scan_of(self, name: str) -> SegmentScan:
        scan = self._scans.get(name)
        if scan is None:
            async with self._reads:
                content = await self._content_of(name)
                try:
                    scan = await in_thread(scan_segment, content)
                except ValueError as error:
                    raise RepositoryCorrupt(f'"{name}" in the repository is not a WAL segment: {error}') from error
            self._scans.put(name, scan)
        return scan

    async def _content_of(self, name: str) -> bytes:
        content = self._contents.get(name)
        if content is None:
            begun = time.perf_counter()
            content = await fetch_segment(self._archive, name, self._system_identifier)
            self.fetched[name] = time.perf_counter() - begun
            self._contents.put(name, content)
        return content


async def fetch_segment(archive: WalArchive, name: str, system_identifier: int | None) -> bytes:
    """Return the checked content of the segment `name`, which was listed.

    Raises:
        RepositoryError: It could not be read, is damaged, or is gone.
    """
    content = await archive.fetch(name, system_identifier)
    if content is None:
        raise gone(name)
    return content


@dataclass(frozen=True, slots=True)
class ListedWal:
    """What a repository holds, as listed now, its index, and the stored size of each WAL segment by name."""

    held: Holdings
    index: WalIndex
    stored_bytes: dict[str, int]

    @property
    def measured_rate(self) -> float | None:
        """Stored bytes downloaded a second so far, a segment at a time; None if they were too few to tell."""
        fetched = sum(self.stored_bytes[name] for name in self.index.fetched)
        seconds = sum(self.index.fetched.values())
        return fetched / seconds if fetched >= _TELLING_BYTES and seconds > 0 else None


async def list_wal(archive: WalArchive, catalog: Sequence[Backup]) -> ListedWal:
    """List the WAL of the repository that holds the base backups of `catalog`.

    Raises:
        RepositoryError: It could not be listed, or what tells the segment size or a history is damaged.
    """
    files = await archive.list_files(cuts=[backup.start_segment for backup in catalog])
    stored = {item.name: item.size for item in files if item.kind is WalFileKind.SEGMENT}
    system_identifier = catalog[-1].system_identifier if catalog else None
    segment_bytes = await segment_size(archive, max(stored), system_identifier) if stored else 0
    held = Holdings(
        backups=catalog,
        histories=await archive.histories([item.name for item in files]),
        wal=ranges_by_timeline(stored, segment_bytes) if stored else {},
        segment_bytes=segment_bytes,
    )
    return ListedWal(held, WalIndex(archive, system_identifier, segment_bytes), stored)


async def segment_size(archive: WalArchive, name: str, system_identifier: int | None) -> int:
    """Return `wal_segment_size` as the archived segment `name` says.

    Raises:
        RepositoryError: It could not be read, or is damaged.
    """
    size = await archive.content_bytes(name)
    if size is None:
        header = await archive.segment_header(name, system_identifier)
        if header is None:
            raise gone(name)
        size = header.segment_bytes
    return size
