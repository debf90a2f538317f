"""An event loop, and a store, in which nothing happens but what the test picks: any interleaving, again and again."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

from agent.errors import RepositoryUnavailable
from agent.ports import Body, DeletedVersion, Deletion, ObjectInfo, OpenObject, StoredObject
from agent.storage.memory import MemoryObjectStore

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class StepwiseLoop(asyncio.SelectorEventLoop):
    """Runs what is ready; what was handed to a thread waits in `jobs` to be done, and time passes only when told."""

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._now = 1000.0
        super().__init__()

    def time(self) -> float:
        """The loop's own clock."""
        return self._now

    def run_in_executor(
        self, _executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Keep the call as a job."""
        answer: asyncio.Future[_T] = self.create_future()
        self.jobs.append(Job(answer, partial(func, *args)))
        return answer

    def settle(self, *, seconds: float = 0) -> None:
        """Let `seconds` pass, and run until everybody waits for a job, a request or for time to pass."""
        self._now += seconds
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # there is no public way to ask
                return

    def do(self, job: "Job") -> None:
        """Do a job, whether or not anybody still waits for it, and run what follows from it."""
        self.jobs.remove(job)
        if not job.answer.done():
            try:
                job.answer.set_result(job.call())
            except Exception as error:  # noqa: BLE001 - whoever waits for the thread is told
                job.answer.set_exception(error)
        self.settle()


@dataclass(eq=False)
class Job:
    """A call handed to a thread."""

    answer: asyncio.Future[Any]
    call: Callable[[], Any]


class Fate(StrEnum):
    """What becomes of a request to the store."""

    ANSWERED = "answered"
    REQUEST_LOST = "request lost"
    ANSWER_LOST = "answer lost"
    SENT_TWICE = "sent twice"  # the first answer was lost, and the transport repeated the request


@dataclass(eq=False)
class Request:
    """A request on its way to the store, by `sender`."""

    sender: object
    what: str
    key: str
    act: Callable[[], Coroutine[Any, Any, Any]]
    answer: asyncio.Future[Any]

    def meet(self, fate: Fate) -> None:
        """Let it reach the store or not, and its answer the sender or not."""
        if fate is Fate.REQUEST_LOST:
            self._fail()
            return
        result = at_once(self.act())
        if fate is Fate.SENT_TWICE:
            result = at_once(self.act())
        if fate is Fate.ANSWER_LOST:
            self._fail()
        elif not self.answer.done():
            self.answer.set_result(result)

    def _fail(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(RepositoryUnavailable(f"{self.what} {self.key} had no answer"))


def at_once(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run what only gives way to others, without letting them."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as end:
            result: _T = end.value
            return result


class StepwiseStore:
    """An `ObjectStore` as one sender sees it: each call waits in `requests` until the test lets it go on."""

    def __init__(self, store: MemoryObjectStore, requests: list[Request]) -> None:
        self._store = store
        self._requests = requests

    async def _ask(self, what: str, key: str, act: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._requests.append(Request(self, what, key, act, answer))
        return await answer

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """As `ObjectStore`."""
        return await self._ask("PUT", key, lambda: self._store.put_if_absent(key, body, metadata=metadata))

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """As `ObjectStore`."""
        await self._ask("PUT", key, lambda: self._store.put(key, body, metadata=metadata))

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """As `ObjectStore`."""
        body = b"".join([bytes(chunk) async for chunk in chunks])
        await self.put(key, body, metadata=metadata)
        return len(body)

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `ObjectStore`."""
        body = b"".join([bytes(chunk) async for chunk in chunks])
        return len(body) if await self.put_if_absent(key, body, metadata=metadata) else None

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        return await self._ask("HEAD", key, lambda: self._store.head(key))

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        return await self._ask("GET", key, lambda: self._store.get(key))

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`; all of the content comes with the answer."""
        stored = await self.get(key)
        yield None if stored is None else OpenObject(stored.info, _whole(stored.body))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""

        async def listed() -> list[ObjectInfo]:
            return [info async for info in self._store.list(prefix, after=after)]

        for info in await self._ask("LIST", prefix, listed):
            yield info

    async def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        async for info in self.list(folder):
            if "/" not in info.key[len(folder) :]:
                yield info

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`."""
        await self._ask("DELETE", " ".join(keys), lambda: self._store.delete(keys))

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`."""
        return await self._ask("DELETE", " ".join(keys), lambda: self._store.delete_many(keys))

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """As `ObjectStore`."""
        return await self._store.deleted_versions(prefix)

    async def check(self) -> None:
        """As `ObjectStore`."""

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        return await self._store.time()

    async def close(self) -> None:
        """As `ObjectStore`."""


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    yield body
