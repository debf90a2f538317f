"""The memory budget: buffers are reserved before they are filled, so that work waits instead of memory growing."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class MemoryBudget:
    """Hands out at most `limit` bytes at a time, first come, first served.

    A reservation larger than the whole budget is granted when nothing else is reserved: work slows down, it is not
    refused. `on_change` is told the bytes in use after each change.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None] | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._on_change = on_change

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget inside the context; wait for them first."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self.used -= size
            elif (size, granted) in self._waiting:
                self._waiting.remove((size, granted))
            self._grant()

    def _grant(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if self.used and self.used + size > self.limit:
                break
            self._waiting.popleft()
            if not granted.cancelled():  # else its waiter has been told, but has not had its turn yet
                self.used += size
                granted.set_result(None)
        if self._on_change is not None:
            self._on_change(self.used)
