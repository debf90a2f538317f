"""Tries on the store what the agent will do with it, on objects of its own, which it removes."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

from agent.domain.store_checks import Operation, StoreFacts, Trial
from agent.errors import AgentError, RepositoryCorrupt, RepositoryError, RepositoryUnavailable
from agent.ports import Clock, ObjectStore

LARGE_BYTES = (16 << 20) + 1
"""More than one part of a multipart upload."""

TRIAL_SECONDS = 60.0
"""After which one operation is given up: the largest sends 16 MiB."""

_PIECE = bytes(1 << 20)


class StoreTrials:
    """One round of trials on `store`. After one that fails, those that need it are left out."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        name = f"pitr_probe_{secrets.token_hex(8)}"
        self._small, self._large, self._absent = f"{name}_small", f"{name}_large", f"{name}_absent"
        self._body = secrets.token_bytes(1000)
        self._trials = dict.fromkeys(Operation, Trial())

    async def run(self) -> StoreFacts:
        """Try everything; return what came of it. Raises nothing of `AgentError`."""
        left: list[str] = []
        if await self._try(Operation.LIST, self._store.check):
            await self._try(Operation.ABSENT, self._look_for_absent)
            try:
                if await self._try(Operation.PUT, self._put):
                    await self._read_and_replace()
            finally:
                left = await self._remove()
        return StoreFacts(self._trials, left, await self._skew() if not self._failed(Operation.LIST) else None)

    def _failed(self, operation: Operation) -> bool:
        return self._trials[operation].problem is not None

    async def _read_and_replace(self) -> None:
        await self._try(Operation.HEAD, self._head)
        await self._try(Operation.GET, self._get)
        await self._try(Operation.LIST_AFTER_PUT, self._list)
        await self._try(Operation.CONDITIONAL_PUT, self._put_again)
        await self._try(Operation.LARGE_OBJECT, self._put_large)

    async def _try(self, operation: Operation, work: Callable[[], Awaitable[None]]) -> bool:
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(TRIAL_SECONDS):
                await work()
        except AgentError as error:
            self._trials[operation] = Trial(problem=error)
            return False
        except TimeoutError:
            self._trials[operation] = Trial(problem=RepositoryUnavailable(f"no answer within {TRIAL_SECONDS:.0f} s"))
            return False
        self._trials[operation] = Trial(self._clock.monotonic() - began)
        return True

    async def _look_for_absent(self) -> None:
        if await self._store.get(self._absent) is not None:
            raise RepositoryCorrupt(f"the store has an object {self._absent}, which nobody stored")

    async def _put(self) -> None:
        await self._store.put(self._small, self._body)

    async def _head(self) -> None:
        info = await self._store.head(self._small)
        _demand(info is not None and info.size == len(self._body), "an object just stored is not described as stored")

    async def _get(self) -> None:
        found = await self._store.get(self._small)
        _demand(found is not None and found.body == self._body, "an object just stored is not read as stored")

    async def _list(self) -> None:
        found = [info.key async for info in self._store.list(self._small)]
        _demand(found == [self._small], "an object just stored is not listed")

    async def _put_again(self) -> None:
        is_new = await self._store.put_if_absent(self._small, b"another")
        found = await self._store.get(self._small)
        _demand(not is_new and found is not None and found.body == self._body, "an object that exists was replaced")

    async def _put_large(self) -> None:
        stored = await self._store.put_stream(self._large, _zeros())
        size = 0
        async with self._store.open(self._large) as opened:
            if opened is not None:
                async for piece in opened:
                    size += len(piece)
        _demand(stored == size == LARGE_BYTES, f"of {LARGE_BYTES} bytes in two parts {size} were read")

    async def _remove(self) -> list[str]:
        """Remove what may have been stored, also by an attempt whose answer was lost; return what is still there."""
        keys = [self._small, self._large]
        if self._failed(Operation.PUT):
            await self._remove_quietly(keys)
            return []
        await self._try(Operation.DELETE, lambda: self._store.delete(keys))
        if not self._failed(Operation.DELETE):
            return []
        return [key for key in keys if await self._is_there(key)]

    async def _remove_quietly(self, keys: list[str]) -> None:
        try:
            await self._store.delete(keys)
        except RepositoryError:
            return  # nothing was stored, as far as is known

    async def _is_there(self, key: str) -> bool:
        try:
            return await self._store.head(key) is not None
        except RepositoryError:
            return True

    async def _skew(self) -> timedelta | AgentError:
        try:
            theirs = await self._store.time()
        except AgentError as error:
            return error
        skew = self._clock.now() - theirs
        # The store tells whole seconds, and the answer was on its way.
        return timedelta() if abs(skew) < timedelta(seconds=2) else skew


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RepositoryCorrupt(otherwise, hint="Do not trust this store with WAL; see its documentation and its log.")


async def _zeros() -> AsyncIterator[bytes]:
    left = LARGE_BYTES
    while left:
        piece = _PIECE[: min(left, len(_PIECE))]
        left -= len(piece)
        yield piece
