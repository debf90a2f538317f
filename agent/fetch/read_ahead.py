"""Downloads the WAL segments that recovery will ask for next, while it replays the ones it has.

Invariants:
    A segment in the spool under its own name was downloaded whole and checked.
    Only what is there is remembered: "absent" and errors of reading ahead are forgotten, and asked anew on request.
    What was read ahead for another timeline or position is dropped as soon as recovery asks for something else.
Memory: `DOWNLOAD_MEMORY_BYTES` of the budget for each download, whatever the segment's size. On disk: `depth` + 1
segments.
"""

import asyncio
from dataclasses import dataclass

import structlog

from agent.budget import MemoryBudget
from agent.domain.wal import parse_segment_name, segment_name
from agent.errors import AgentError, RepositoryUnavailable
from agent.fetch.spool import Spool
from agent.repository.wal_archive import Downloaded, WalArchive
from agent.tasks import in_thread

# Three pieces of 1 MiB, what the connection has received besides, and the codec's buffers: 8 MiB with lz4 and zstd.
DOWNLOAD_MEMORY_BYTES = 14 << 20
# Replay takes 80 ms and more for a segment, a download less: two ahead hide it, one more covers a slow one.
_MOST_AHEAD = 3

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a download ended: with a segment, with neither if it is not in the archive, or with an error."""

    segment: Downloaded | None = None
    error: AgentError | None = None


def most_ahead(download_concurrency: int) -> int:
    """Return how many segments are worth reading ahead where so many downloads may run at once."""
    return min(download_concurrency, _MOST_AHEAD)


class ReadAhead:
    """Keeps the next `depth` segments in the spool. Run it as a service."""

    name = "read ahead"

    def __init__(self, archive: WalArchive, spool: Spool, budget: MemoryBudget, depth: int) -> None:
        self.spool = spool
        self._budget = budget
        self._archive = archive
        self._depth = depth
        self._downloads: dict[str, asyncio.Task[_Ended]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._is_open = False
        self._end: str | None = None

    async def run(self) -> None:
        """Own the downloads until cancelled; leave nothing in pg_wal."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await asyncio.Event().wait()
        finally:
            self._group = None
            if self._is_open:
                await in_thread(self.spool.clear)

    async def is_ready(self) -> bool:
        """Tell whether there is a spool to download into; make it if it can be made now."""
        if self._group is not None and not self._is_open:
            self._is_open = await in_thread(self.spool.open)
        return self._group is not None and self._is_open

    async def obtain(self, name: str, system_identifier: int | None) -> Downloaded | None:
        """Return once the segment `name` is in the spool, or None if it is not in the archive.

        Raises:
            RepositoryCorrupt: What is stored is not that segment.
            RepositoryError: It could not be read.
        """
        if name not in self._downloads:
            await self._drop_all()
        elif (ended := await self._wait_for(name)).segment is not None:
            return ended.segment
        self._end = None
        self._start(name, system_identifier)
        ended = await self._wait_for(name)
        if ended.error is not None:
            raise ended.error
        return ended.segment

    async def _wait_for(self, name: str) -> _Ended:
        download = self._downloads[name]
        await asyncio.wait([download])
        if self._downloads.get(name) is download:
            del self._downloads[name]
        if download.cancelled():
            return _Ended(error=RepositoryUnavailable(f'the request for WAL file "{name}" was overtaken by another'))
        return download.result()

    def go_on(self, name: str, segment_bytes: int, system_identifier: int | None) -> None:
        """Download what follows the segment `name`, as far as it is not there and not known to end before."""
        timeline, lsn = parse_segment_name(name, segment_bytes)
        for step in range(1, self._depth + 1):
            following = segment_name(timeline, lsn + step * segment_bytes, segment_bytes)
            if self._end is not None and following >= self._end:
                return
            if following not in self._downloads:
                self._start(following, system_identifier)

    def _start(self, name: str, system_identifier: int | None) -> None:
        if self._group is None:
            raise RepositoryUnavailable("the agent is stopping")
        work = self._download(name, system_identifier)
        self._downloads[name] = self._group.create_task(work, name=f"download {name}")

    async def _download(self, name: str, system_identifier: int | None) -> _Ended:
        try:
            segment = await self._into_spool(name, system_identifier)
        except AgentError as error:
            return _Ended(error=error)
        if segment is not None:
            self._flush_if_idle(name)
        elif self._end is None or name < self._end:
            self._end = name
        return _Ended(segment)

    def _flush_if_idle(self, name: str) -> None:
        """Have the segment `name` written to disk meanwhile, if no other is on its way.

        PostgreSQL flushes each segment before it replays it, which takes 5 to 10 ms for 16 MiB in the page cache. While
        others are downloaded recovery is as fast as they come, and that work is left to it.
        Source: durable_rename(), called by KeepFileRestoredFromArchive() in PostgreSQL's xlogarchive.c.
        """
        is_idle = all(download.done() for other, download in self._downloads.items() if other != name)
        if is_idle and self._group is not None:
            self._group.create_task(self._flush(name), name=f"flush {name}")

    async def _flush(self, name: str) -> None:
        try:
            await in_thread(self.spool.flush, name)
        except OSError as error:
            # PostgreSQL flushes it as well, and a segment that is lost in a crash is fetched again.
            log.warning("wal not flushed", wal_file=name, reason=error.strerror)

    async def _into_spool(self, name: str, system_identifier: int | None) -> Downloaded | None:
        kept = False
        file = self.spool.begin(name)
        try:
            async with self._budget.reserve(DOWNLOAD_MEMORY_BYTES):
                await self._archive.require_one_content(name)
                segment = await self._archive.download(name, file.write, system_identifier)
            if segment is not None:
                await in_thread(file.complete)
                kept = True
        except OSError as error:
            self._is_open = False  # emptied, or made again, when it is needed next
            raise RepositoryUnavailable(
                f"{self.spool.path} cannot be written: {error.strerror}",
                hint="Check the WAL volume, and its free space.",
            ) from error
        else:
            return segment
        finally:
            if not kept:
                file.close()
                self.spool.discard(name)

    async def _drop_all(self) -> None:
        """Forget what was read ahead: recovery has gone another way."""
        dropped, self._downloads = self._downloads, {}
        for download in dropped.values():
            download.cancel()
        if dropped:
            await asyncio.wait(dropped.values())
            for name in dropped:
                await in_thread(self.spool.discard, name)
