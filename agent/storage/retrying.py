"""Repeating what failed for a passing reason.

A call that can be made again as a whole is repeated by `RetryingStore`. A stream cannot: what was read from it is
gone. The store that sends or reads the stream repeats its single requests with the same `Retry`.
"""

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import TypeVar

import structlog

from agent.errors import RepositoryError, RepositoryUnavailable
from agent.ports import Body, Clock, DeletedVersion, Deletion, ObjectInfo, ObjectStore, OpenObject, StoredObject
from agent.storage.health import StoreHealth
from agent.telemetry.news import News

_T = TypeVar("_T")
_FIRST_DELAY_SECONDS = 0.2
_LONGEST_DELAY_SECONDS = 10.0
_CHECK_SECONDS = 5.0  # somebody waits for the answer: outlive a stumble, not an outage
_REMIND_SECONDS = 300.0
_QUIET_SECONDS = 10.0  # without a failure, after which an outage is over: the longest delay between two attempts

log = structlog.get_logger()


class _Outage:
    """Tells when requests begin to fail, every five minutes that they still do, and when they do no longer.

    Not at every failure: an hour's outage is thousands of them. Another kind of failure, by its hint, is told as well.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._began = self._failed = 0.0
        self._news = News(_REMIND_SECONDS, clock.monotonic)

    def failed(self, error: RepositoryUnavailable) -> None:
        """Take note of a failed attempt."""
        now = self._failed = self._clock.monotonic()
        if self._failures == 0:
            self._began = now
            self._news.forget()
        if self._news.is_news(error.hint):
            log.warning(
                "repository requests fail", error=error.one_line(), since_seconds=round(now - self._began),
                failures=self._failures + 1,
            )  # fmt: skip
        self._failures += 1

    def succeeded(self) -> None:
        """Take note of a successful attempt."""
        if self._failures and self._clock.monotonic() - self._failed >= _QUIET_SECONDS:
            log.info(
                "repository requests succeed again", after_seconds=round(self._failed - self._began),
                failures=self._failures,
            )  # fmt: skip
            self._failures = 0


class Retry:
    """Repeats a call while it raises `RepositoryUnavailable`: delays double from 0.2 to 10 seconds, with full jitter.

    Jitter keeps many agents from coming back to a recovering store at the same moment. There is one for a process, so
    that what it tells of an outage is told once.
    """

    def __init__(
        self,
        clock: Clock,
        deadline_seconds: float,
        count_failure: Callable[[], object] = lambda: None,
        health: StoreHealth | None = None,
    ) -> None:
        """`deadline_seconds` after the first attempt began no further one begins; 0: only one attempt.

        `count_failure` is called at each attempt that fails; `health` is told of each attempt, for a call may fail for
        minutes before whoever made it hears of that.
        """
        self._clock = clock
        self._deadline_seconds = deadline_seconds
        self._count_failure = count_failure
        self._health = health or StoreHealth(clock)
        self._outage = _Outage(clock)

    async def __call__(self, call: Callable[[], Awaitable[_T]], *, at_most_seconds: float = math.inf) -> _T:
        """Return what `call` returns; no further attempt begins after the deadline, nor after `at_most_seconds`.

        Raises:
            RepositoryUnavailable: The last attempt's, when there is no time for another.
            Exception: Any other error of `call`, at once.
        """
        deadline = self._clock.monotonic() + min(self._deadline_seconds, at_most_seconds)
        longest = _FIRST_DELAY_SECONDS
        while True:
            try:
                result = await call()
            except RepositoryUnavailable as error:
                delay = random.uniform(0, longest)  # noqa: S311 - jitter, not a secret
                self._outage.failed(error)
                self._health.failed(error.one_line())
                self._count_failure()
                if self._clock.monotonic() + delay >= deadline:
                    raise
            else:
                self._outage.succeeded()
                self._health.answered()
                return result
            await self._clock.sleep(delay)
            longest = min(2 * longest, _LONGEST_DELAY_SECONDS)


class RetryingStore:
    """An `ObjectStore` around another one: calls that fail with `RepositoryUnavailable` are made again.

    Not repeated here: `put_stream` and its like, whose chunks are gone; reading from `open` after it was entered;
    `list` and `list_folder`. `check`, which asks how the store is now, is repeated for a few seconds only.
    """

    def __init__(self, store: ObjectStore, retry: Retry) -> None:
        self._store = store
        self._retry = retry

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """As `ObjectStore`. False after an attempt whose answer was lost may mean its own object: compare."""
        return await self._retry(partial(self._store.put_if_absent, key, body, metadata=metadata))

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """As `ObjectStore`."""
        await self._retry(partial(self._store.put, key, body, metadata=metadata))

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """As `ObjectStore`; made once."""
        return await self._store.put_stream(key, chunks, metadata=metadata)

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `ObjectStore`; made once."""
        return await self._store.put_stream_if_absent(key, chunks, metadata=metadata)

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        return await self._retry(partial(self._store.head, key))

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        return await self._retry(partial(self._store.get, key))

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`; opening is repeated."""
        async with AsyncExitStack() as stack:
            yield await self._retry(lambda: stack.enter_async_context(self._store.open(key)))

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        return self._store.list(prefix, after=after)

    def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        return self._store.list_folder(folder)

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`."""
        await self._retry(partial(self._store.delete, keys))

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`; what was not removed for a passing reason is tried again."""
        left = list(keys)
        refused: dict[str, RepositoryError] = {}
        keeps_versions = False

        async def attempt() -> None:
            nonlocal left, keeps_versions
            deletion = await self._store.delete_many(left)
            keeps_versions |= deletion.keeps_versions
            passing = {key: e for key, e in deletion.failed.items() if isinstance(e, RepositoryUnavailable)}
            refused.update({key: error for key, error in deletion.failed.items() if key not in passing})
            left = list(passing)
            Deletion(passing).raise_first()

        await self._retry(attempt)
        return Deletion(refused, keeps_versions)

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """As `ObjectStore`."""
        return await self._retry(partial(self._store.deleted_versions, prefix))

    async def check(self) -> None:
        """As `ObjectStore`; repeated for 5 seconds."""
        await self._retry(self._store.check, at_most_seconds=_CHECK_SECONDS)

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        return await self._retry(self._store.time)

    async def close(self) -> None:
        """As `ObjectStore`."""
        await self._store.close()
