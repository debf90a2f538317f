"""`ObjectStore` in memory, for tests of services; the contract suite holds it to the same contract as S3."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from agent.ports import Body, Clock, DeletedVersion, Deletion, ObjectInfo, OpenObject, StoredObject
from agent.storage.clock import SystemClock

_PIECE_BYTES = 1 << 20


class MemoryObjectStore:
    """Objects in a dictionary. Every call gives way to other tasks once, as a network would."""

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock` tells when objects are stored; default: the real one."""
        self._objects: dict[str, StoredObject] = {}
        self._clock = clock or SystemClock()

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """As `ObjectStore`."""
        await asyncio.sleep(0)
        if key in self._objects:
            return False
        self._store(key, bytes(body), metadata)
        return True

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """As `ObjectStore`."""
        await asyncio.sleep(0)
        self._store(key, bytes(body), metadata)

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """As `ObjectStore`."""
        body = b"".join([bytes(chunk) async for chunk in chunks])
        self._store(key, body, metadata)
        return len(body)

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `ObjectStore`."""
        body = b"".join([bytes(chunk) async for chunk in chunks])
        return len(body) if await self.put_if_absent(key, body, metadata=metadata) else None

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        stored = await self.get(key)
        return None if stored is None else stored.info

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        await asyncio.sleep(0)
        return self._objects.get(key)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`."""
        stored = await self.get(key)
        yield None if stored is None else OpenObject(stored.info, _pieces(stored.body))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        await asyncio.sleep(0)
        for key in sorted(self._objects):
            if key.startswith(prefix) and key > after:
                info = self._objects[key].info
                yield ObjectInfo(key, info.size, info.modified_at)

    async def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        async for info in self.list(folder):
            if "/" not in info.key[len(folder) :]:
                yield info

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`."""
        await asyncio.sleep(0)
        for key in keys:
            self._objects.pop(key, None)

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`."""
        await self.delete(keys)
        return Deletion()

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:  # noqa: ARG002 - it keeps none
        """As `ObjectStore`."""
        return {}

    async def check(self) -> None:
        """As `ObjectStore`."""

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        return self._clock.now()

    async def close(self) -> None:
        """As `ObjectStore`."""

    def _store(self, key: str, body: bytes, metadata: Mapping[str, str] | None) -> None:
        lowered = {name.lower(): value for name, value in (metadata or {}).items()}
        self._objects[key] = StoredObject(ObjectInfo(key, len(body), self._clock.now(), lowered), body)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]
