"""Counting what the repository is asked, and what it says."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime

from agent.errors import RepositoryCorrupt, RepositoryRefused, RepositoryUnavailable
from agent.ports import Body, Clock, DeletedVersion, Deletion, ObjectInfo, ObjectStore, OpenObject, StoredObject
from agent.storage.health import StoreHealth
from agent.telemetry.metrics import Metrics


@dataclass(slots=True)
class _Outcome:
    result: str = "ok"


class MeteredStore:
    """An `ObjectStore` around another one that keeps the `repository_*` metrics, and `health` informed.

    The label `result` is one of ok, absent, exists, unavailable, refused, corrupt and cancelled (also: given up by
    the caller). Reading and listing count as one request, timed until the first answer; a stream that is stored counts
    as one, timed to its end.
    """

    def __init__(self, store: ObjectStore, metrics: Metrics, clock: Clock, health: StoreHealth | None = None) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._health = health or StoreHealth(clock)

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """As `ObjectStore`."""
        with self._measured("put_if_absent") as outcome:
            stored = await self._store.put_if_absent(key, body, metadata=metadata)
            outcome.result = "ok" if stored else "exists"
            self._count("sent", len(body))
            return stored

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """As `ObjectStore`."""
        with self._measured("put"):
            await self._store.put(key, body, metadata=metadata)
            self._count("sent", len(body))

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """As `ObjectStore`."""
        with self._measured("put_stream"):
            size = await self._store.put_stream(key, chunks, metadata=metadata)
            self._count("sent", size)
            return size

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `ObjectStore`."""
        with self._measured("put_stream_if_absent") as outcome:
            size = await self._store.put_stream_if_absent(key, chunks, metadata=metadata)
            outcome.result = "exists" if size is None else "ok"
            self._count("sent", size or 0)
            return size

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        with self._measured("head") as outcome:
            info = await self._store.head(key)
            outcome.result = "absent" if info is None else "ok"
            return info

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        with self._measured("get") as outcome:
            stored = await self._store.get(key)
            outcome.result = "absent" if stored is None else "ok"
            self._count("received", 0 if stored is None else stored.info.size)
            return stored

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`."""
        async with AsyncExitStack() as stack:
            with self._measured("open") as outcome:
                opened = await stack.enter_async_context(self._store.open(key))
                outcome.result = "absent" if opened is None else "ok"
            yield None if opened is None else OpenObject(opened.info, self._counted(opened.pieces))

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        return self._listed(self._store.list(prefix, after=after))

    def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        return self._listed(self._store.list_folder(folder))

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`."""
        with self._measured("delete"):
            await self._store.delete(keys)

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`."""
        with self._measured("delete") as outcome:
            deletion = await self._store.delete_many(keys)
            outcome.result = "refused" if deletion.failed else "ok"
            return deletion

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """As `ObjectStore`."""
        with self._measured("list"):
            return await self._store.deleted_versions(prefix)

    async def check(self) -> None:
        """As `ObjectStore`."""
        with self._measured("check"):
            await self._store.check()

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        with self._measured("check"):
            return await self._store.time()

    async def close(self) -> None:
        """As `ObjectStore`."""
        await self._store.close()

    @contextmanager
    def _measured(self, operation: str) -> Iterator[_Outcome]:
        outcome, started = _Outcome(), self._clock.monotonic()
        try:
            yield outcome
        except BaseException as error:
            outcome.result = _result_of(error)
            if isinstance(error, RepositoryUnavailable | RepositoryRefused):
                self._health.failed(error.one_line())
            raise
        else:
            self._health.answered()
        finally:
            self._metrics.repository_seconds.labels(operation).observe(self._clock.monotonic() - started)
            self._metrics.repository_requests.labels(operation, outcome.result).inc()

    def _count(self, direction: str, size: int) -> None:
        self._metrics.repository_bytes.labels(direction).inc(size)

    async def _counted(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            self._count("received", len(piece))
            yield piece

    async def _listed(self, objects: AsyncIterator[ObjectInfo]) -> AsyncIterator[ObjectInfo]:
        with self._measured("list"):
            first = await anext(objects, None)
        if first is not None:
            yield first
            async for info in objects:
                yield info


def _result_of(error: BaseException) -> str:
    match error:
        case RepositoryUnavailable():
            return "unavailable"
        case RepositoryRefused():
            return "refused"
        case RepositoryCorrupt():
            return "corrupt"
        case _:
            return "cancelled"
