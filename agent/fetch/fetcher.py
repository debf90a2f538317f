"""Serves WAL files to recovery.

Invariants:
    "Absent" is said only after the repository proved it, and never in front of a hole: PostgreSQL takes it as the end
    of the WAL and opens the server.
    What is handed out was checked: codec, digest, size, header, database cluster.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from agent.budget import MemoryBudget
from agent.domain.lsn import format_lsn
from agent.domain.timeline import history_name
from agent.domain.wal import WalFileKind, parse_segment_header, parse_segment_name, segment_problem, wal_file_kind
from agent.domain.wal_check import CheckedSegment, continuation_problem, wal_ends_in
from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryUnavailable
from agent.fetch.read_ahead import DOWNLOAD_MEMORY_BYTES, ReadAhead
from agent.ports import Clock
from agent.repository.read_twice import read_twice
from agent.repository.wal_archive import OpenWal, WalArchive
from agent.tasks import in_thread
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AwaitedWal

HOLE_SECONDS = 5.0  # between two looks at the same hole, however often the hook asks
AWAITED_SECONDS = 1800.0  # a request takes 10 minutes, a pod is restarted within 5: who has not asked since has the WAL

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WalStream:
    """A WAL file to be sent: its size, and its bytes in pieces of 1 MiB at most.

    `pieces` raises before the last one if what was read must not be replayed: then the file must not become whole.
    """

    size: int
    pieces: AsyncIterator[bytes]


async def _single(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _nowhere(_piece: bytes) -> None:
    """Take what is only read to be checked."""


@dataclass(slots=True)
class _Answer:
    """What a request came to: the file's size, None if it is absent."""

    size: int | None = None


class _Hole(RepositoryUnavailable):
    """A file is missing that was in the archive: what comes after it is there, or what a bucket with versions keeps."""


class WalFetcher:
    """Answers requests of recovery from the archive."""

    def __init__(
        self, archive: WalArchive, read_ahead: ReadAhead, budget: MemoryBudget, clock: Clock, metrics: Metrics
    ) -> None:
        self._archive = archive
        self._budget = budget
        self._read_ahead = read_ahead
        self._clock = clock
        self._metrics = metrics
        self._histories: dict[str, bytes] = {}
        self._segment_bytes: int | None = None
        self._before: CheckedSegment | None = None
        self._suspects: set[str] = set()
        self._hole: tuple[str, _Hole, float] | None = None  # the file, and when that was seen
        self.last_fetched: str | None = None
        self._awaited: dict[str, tuple[AwaitedWal, float]] = {}  # by name, and when it was asked for last
        metrics.fetch_awaited.set_function(lambda: self.awaited.since.timestamp() if self.awaited else 0.0)

    @property
    def awaited(self) -> AwaitedWal | None:
        """What recovery has been asking for longest, None if it has all; a standby asks for histories in between.

        What nobody has asked for during `AWAITED_SECONDS` is not awaited: a standby may have had it by streaming.
        """
        now = self._clock.monotonic()
        asked = [awaited for awaited, asked_at in self._awaited.values() if now - asked_at < AWAITED_SECONDS]
        return min(asked, key=lambda awaited: awaited.since, default=None)

    @asynccontextmanager
    async def open(self, name: str, system_identifier: int | None) -> AsyncIterator[WalStream | None]:
        """Open the WAL file `name` to be sent; the context is None if it is proven not to be in the archive.

        Raises:
            RepositoryUnavailable: The repository did not answer; or `name` is a hole: later WAL of its line is there;
                or what was read is damaged: whether the object is, another request will tell.
            RepositoryCorrupt: What is stored under `name` must not be replayed.
        """
        is_segment = wal_file_kind(name) in (WalFileKind.SEGMENT, WalFileKind.PARTIAL)
        opening = self._open_segment if is_segment else self._open_small
        with self._measured(name) as answer:
            self._refuse_known_hole(name)
            async with opening(name, system_identifier) as stream:
                if stream is None:
                    await self._refuse_hole(name, system_identifier)
                else:
                    answer.size = stream.size
                yield stream

    @asynccontextmanager
    async def _open_small(self, name: str, system_identifier: int | None) -> AsyncIterator[WalStream | None]:
        content = await self._content(name, system_identifier)
        yield None if content is None else WalStream(len(content), _single(content))

    @asynccontextmanager
    async def _open_segment(self, name: str, system_identifier: int | None) -> AsyncIterator[WalStream | None]:
        """Open a segment that is sent while it is read: it may be larger than the memory budget."""
        async with self._budget.reserve(DOWNLOAD_MEMORY_BYTES):
            await self._archive.require_one_content(name)
            if name in self._suspects:
                segment = await read_twice(
                    partial(self._archive.download, name, _nowhere, system_identifier),
                    "wal fetched again", wal_file=name,
                )  # fmt: skip
                await self._check_continuity(name, None if segment is None else segment.records)
            try:
                async with self._archive.open(name, system_identifier) as wal:
                    yield None if wal is None else await self._stream(name, wal, system_identifier)
            except RepositoryCorrupt as error:
                self._suspects.add(name)
                raise RepositoryUnavailable(error.message, hint="It is read again when it is asked for.") from error
            self._suspects.discard(name)

    async def _stream(self, name: str, wal: OpenWal, system_identifier: int | None) -> WalStream:
        pieces = wal.pieces()
        first = await anext(pieces, b"")
        try:
            size = parse_segment_header(first).segment_bytes
        except ValueError as error:
            raise RepositoryCorrupt(f'what is archived as WAL segment "{name}" is none: {error}') from error
        if (problem := segment_problem(name, size, first, system_identifier)) is not None:
            raise RepositoryCorrupt(f'what is archived as WAL segment "{name}" is not it: {problem}')
        return WalStream(size, self._sent_when_checked(name, wal, size, first, pieces))

    async def _sent_when_checked(
        self, name: str, wal: OpenWal, size: int, held: bytes, pieces: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """Yield the pieces; the last, without which the others are of no use, only when all are known to be good."""
        sent = 0
        async for piece in pieces:
            sent += len(held)
            if sent >= size:  # nobody takes more than `size` bytes: the file would be whole before it is checked
                raise RepositoryCorrupt(f'what is archived as WAL segment "{name}" goes on after {size} bytes')
            yield held
            held = piece
        await self._check_continuity(name, wal.content.records)
        yield held

    async def _content(self, name: str, system_identifier: int | None) -> bytes | None:
        """Return the content of the WAL file `name`; a history file that was fetched before, even if the store is away.

        At promotion PostgreSQL removes its signal files, and only then asks for its parent's history: a failure then
        leaves a directory that the next start takes for a crashed server on the old timeline. No history file ever
        changes, and timeline 1 has none. Source: StartupXLOG() in xlog.c, writeTimeLineHistory() in timeline.c.
        """
        if name == history_name(1):
            return None
        try:
            await self._archive.require_one_content(name)
            content = await self._archive.fetch(name, system_identifier)
        except RepositoryError:
            if name not in self._histories:
                raise
            return self._histories[name]
        if content is not None and wal_file_kind(name) is WalFileKind.HISTORY:
            self._histories[name] = content
        return content

    async def can_place(self, name: str) -> bool:
        """Tell whether `place` can be used: for segments, where the agent may write into pg_wal."""
        return wal_file_kind(name) is WalFileKind.SEGMENT and await self._read_ahead.is_ready()

    async def place(self, name: str, destination: Path, system_identifier: int | None) -> bool:
        """Put the segment `name` at `destination`, a new name in pg_wal; then download what follows it.

        Returns:
            False if it is proven not to be in the archive.

        Raises:
            RepositoryUnavailable: As of `fetch`; or `destination` could not be written.
            RepositoryCorrupt: As of `open`.
        """
        with self._measured(name) as answer:
            self._refuse_known_hole(name)
            segment = await read_twice(
                partial(self._read_ahead.obtain, name, system_identifier), "wal fetched again", wal_file=name
            )
            if segment is None:
                await self._refuse_hole(name, system_identifier)
                return False
            await self._check_continuity(name, segment.records)
            try:
                await in_thread(self._read_ahead.spool.give, name, destination)
            except OSError as error:
                raise RepositoryUnavailable(f"{destination} cannot be written: {error.strerror}") from error
            # Not before: recovery waits for this answer, and asking the store would delay it by a millisecond.
            self._read_ahead.go_on(name, segment.size, system_identifier)
            answer.size = segment.size
            return True

    async def _check_continuity(self, name: str, segment: CheckedSegment | None) -> None:
        """Check what only the neighbours of a segment tell, if its records were walked; then remember it.

        Raises:
            RepositoryCorrupt: It does not continue the one handed out before, or ends although there is later WAL.
        """
        before, self._before = self._before, segment
        if segment is None:
            return
        if before is not None and before.end_lsn != segment.start_lsn:
            before = None
        problem = None if before is None else continuation_problem(before, segment)
        if wal_ends_in(before, segment) and (later := await self._later_segment(name)) is not None:
            problem = f'its WAL ends at {format_lsn(segment.ended_at or 0)}, but "{later}" after it is in the archive'
        if problem is not None:
            self._before = before
            raise RepositoryCorrupt(
                f'WAL segment "{name}" cannot be replayed: {problem}',
                hint="Restore the object from a copy, or recover to a moment before it.",
            )

    @contextmanager
    def _measured(self, name: str) -> Iterator[_Answer]:
        started, answer = self._clock.monotonic(), _Answer()
        self._await(name)
        try:
            yield answer
        except Exception:
            self._metrics.fetched_files.labels(result="failed").inc()
            raise
        self._awaited.pop(name, None)
        seconds = self._clock.monotonic() - started
        self._metrics.fetch_seconds.observe(seconds)
        if answer.size is None:
            self._metrics.fetched_files.labels(result="absent").inc()
            log.info("wal not in the archive", wal_file=name, seconds=round(seconds, 4))
            return
        self._metrics.fetched_files.labels(result="served").inc()
        self._metrics.fetched_bytes.inc(answer.size)
        self.last_fetched = name
        if wal_file_kind(name) is WalFileKind.SEGMENT:
            self._segment_bytes = answer.size
            self._awaited.clear()  # recovery has come further
        log.info("wal_fetch", wal_file=name, content_bytes=answer.size, seconds=round(seconds, 4))

    def _await(self, name: str) -> None:
        now = self._clock.monotonic()
        self._awaited = {each: known for each, known in self._awaited.items() if now - known[1] < AWAITED_SECONDS}
        first, _ = self._awaited.get(name, (AwaitedWal(name, self._clock.now(), 0), now))
        self._awaited[name] = (replace(first, attempts=first.attempts + 1), now)

    async def _refuse_hole(self, name: str, system_identifier: int | None) -> None:
        """Raise if what is archived shows that `name` existed, and remember that for a moment."""
        try:
            match wal_file_kind(name):
                case WalFileKind.HISTORY:
                    await self._refuse_lost_history(name)
                case WalFileKind.SEGMENT:
                    await self._refuse_lost_segment(name, system_identifier)
        except _Hole as hole:
            self._hole = (name, hole, self._clock.monotonic())
            raise

    async def _refuse_lost_segment(self, name: str, system_identifier: int | None) -> None:
        if (witness := await self._later_segment(name)) is not None:
            raise _Hole(
                f'WAL segment "{name}" is missing from the archive, but "{witness}" after it is there',
                hint="It may still be on its way; if it is lost, recover to a moment before it.",
            )
        if (version := await self._archive.deleted(name, system_identifier)) is not None:
            raise _Hole(
                f'WAL segment "{name}" was archived and is deleted; the bucket keeps {version}',
                hint="Remove the delete marker to have it back, or all its versions if it is not wanted; "
                "or recover to a moment before it.",
            )

    def _refuse_known_hole(self, name: str) -> None:
        """Raise if `name` was a hole a moment ago: the store is not asked whether it still is."""
        if self._hole is not None:
            known, hole, seen_at = self._hole
            if known == name and self._clock.monotonic() - seen_at < HOLE_SECONDS:
                raise _Hole(hole.message, hint=hole.hint)

    async def _refuse_lost_history(self, name: str) -> None:
        """Raise if the history file `name` must have existed: files of its timeline or a later one, and of an earlier.

        PostgreSQL takes the first history file that is absent for the end of the timelines: it would recover along an
        older one, and then take a number that is in use. A repository begun on a later timeline never had its history.
        Source: findNewestTimeLine() in PostgreSQL's timeline.c.
        """
        timeline = name[:8]
        witness = None if name == history_name(1) else await self._archive.first_file(after=timeline)
        if witness is None:
            return
        earliest = await self._archive.first_file()
        if earliest is not None and earliest.name[:8] < timeline:
            raise RepositoryUnavailable(
                f'history file "{name}" is missing from the archive, but "{witness.name}" is there',
                hint="Put it back; any server that was on that timeline has it in pg_wal.",
            )

    async def _later_segment(self, name: str) -> str | None:
        """Name an archived segment after `name`, of its timeline or of one that branched off later."""
        if (witness := await self._archive.next_segment(name)) is not None:
            return witness
        last = name
        while (first := await self._archive.first_file(after=f"{last[:8]}~")) is not None:  # of the next timeline
            last = first.name
            witness = last if first.kind is WalFileKind.SEGMENT else await self._archive.next_segment(last)
            if witness is not None and await self._branched_off_after(name, witness):
                return witness
        return None

    async def _branched_off_after(self, name: str, witness: str) -> bool:
        """Tell whether the timeline of the segment `witness` goes on from that of `name`, after all of it."""
        segment_bytes = await self._known_segment_bytes(witness)
        if segment_bytes is None:
            return False
        timeline, start_lsn = parse_segment_name(name, segment_bytes)
        child = int(witness[:8], 16)
        ancestors = (await self._archive.histories([history_name(child)])).get(child, ())
        return any(a.timeline == timeline and a.switch_lsn >= start_lsn + segment_bytes for a in ancestors)

    async def _known_segment_bytes(self, stored: str) -> int | None:
        if self._segment_bytes is None:
            async with self._archive.open(stored) as wal:
                if wal is not None:
                    self._segment_bytes = parse_segment_header(await anext(wal.pieces(), b"")).segment_bytes
        return self._segment_bytes
