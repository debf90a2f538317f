"""An archive of very many segments, each made when it is read, and what is asked of it."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from agent.domain.wal import segment_name
from agent.domain.wal_times import segment_times
from agent.ports import ObjectInfo, OpenObject
from agent.repository.keys import WAL_FOLDER, metadata_key, sentinel_key
from agent.repository.wal_metadata import wal_metadata
from agent.storage.memory import MemoryObjectStore
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter, to_wal_time

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
FIRST = 16  # number of the first segment
_PAGE_KEYS = 1000


class LargeArchive(MemoryObjectStore):
    """Segments of one timeline, a commit every minute, one in each, but in every third and in a long bulk load.

    Every fifth segment has a checkpoint; a base backup was taken at every `backup_every`th. `requests` counts what is
    asked, a page of a listing as one; each takes `seconds`.
    """

    def __init__(
        self, segments: int, *, backup_every: int, bulk: range = range(0), with_times: bool = True, seconds: float = 0
    ) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()
        self._numbers = range(FIRST, FIRST + segments)
        self._keys = [self._key(number) for number in self._numbers]
        self._bulk = bulk
        self._with_times = with_times
        self._seconds = seconds
        self.backups = [number for number in self._numbers if (number - FIRST) % backup_every == 0]

    @staticmethod
    def moment(number: int, *, seconds: float = 0) -> datetime:
        """When the commit of segment `number` is, if there is one; or so long after it."""
        return BEGIN + timedelta(minutes=number, seconds=seconds)

    def has_commit(self, number: int) -> bool:
        """Tell whether a transaction ends in segment `number`."""
        return number in self.backups or (number % 3 != 0 and number not in self._bulk)

    async def prepare(self) -> None:
        """Store the base backups."""
        for number in self.backups:
            name = f"base_{segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES)}"
            start, finish = number * SEGMENT_BYTES + 40, number * SEGMENT_BYTES + 200
            times = {"start_time": self.moment(number - 1).isoformat(), "finish_time": self.moment(number).isoformat()}
            sentinel = {"LSN": start, "FinishLSN": finish, "PgVersion": 150000, "SystemIdentifier": SYSTEM_IDENTIFIER}
            await self.put(sentinel_key(name), json.dumps(sentinel).encode())
            await self.put(metadata_key(name), json.dumps(times).encode())

    def grow(self, segments: int) -> None:
        """Archive more segments."""
        more = range(self._numbers.stop, self._numbers.stop + segments)
        self._numbers = range(FIRST, more.stop)
        self._keys += [self._key(number) for number in more]

    async def remove_oldest_backup(self) -> None:
        """Remove a base backup, but not its WAL."""
        name = f"base_{segment_name(1, self.backups.pop(0) * SEGMENT_BYTES, SEGMENT_BYTES)}"
        await self.delete([sentinel_key(name), metadata_key(name)])

    def content(self, number: int) -> bytes:
        """Make segment `number`."""
        writer = WalWriter(number * SEGMENT_BYTES)
        if self.has_commit(number):
            writer.filler(400)
            writer.transaction(0x00, 1000 + number, to_wal_time(self.moment(number)))
        if number % 5 == 0:
            following = 1001 + number
            seconds = int(self.moment(number).timestamp())
            writer.checkpoint(seconds, next_xid=following, oldest_active_xid=following)
        writer.switch()
        return writer.segments()[0]

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        await self._asked("head")
        number = self._number(key)
        if number is None:
            return await super().head(key)
        metadata = {}
        if self._with_times:
            metadata = wal_metadata("", SEGMENT_BYTES, SYSTEM_IDENTIFIER, segment_times(self.content(number)))
        return ObjectInfo(key, SEGMENT_BYTES, BEGIN, metadata)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`."""
        number = self._number(key)
        await self._asked("open" if number is not None else "document")
        if number is None:
            async with super().open(key) as opened:
                yield opened
        else:
            yield OpenObject(ObjectInfo(key, SEGMENT_BYTES, BEGIN), _one(self.content(number)))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        if prefix != WAL_FOLDER:
            await self._asked("list")
            async for info in super().list(prefix, after=after):
                yield info
            return
        keys = [key for key in self._keys if key > after]
        for index, key in enumerate(keys or [""]):
            if index % _PAGE_KEYS == 0:
                await self._asked("list")
            if key:
                yield ObjectInfo(key, SEGMENT_BYTES, BEGIN)

    async def _asked(self, kind: str) -> None:
        self.requests[kind] += 1
        await asyncio.sleep(self._seconds)

    def _key(self, number: int) -> str:
        return f"{WAL_FOLDER}{segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES)}"

    def _number(self, key: str) -> int | None:
        if not key.startswith(WAL_FOLDER):
            return None
        name = key.removeprefix(WAL_FOLDER)
        number = int(name[8:16], 16) * ((1 << 32) // SEGMENT_BYTES) + int(name[16:24], 16)
        return number if number in self._numbers and self._key(number) == key else None


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content
