"""The memory budget: buffers are reserved before they are filled, so that work waits instead of memory growing."""

import asyncio
import ctypes
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


def give_back() -> None:
    """Give the system what is free of this process's memory; takes up to some tens of milliseconds.

    Nothing is done where the C library is not glibc. Source: malloc_trim(3).
    """
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


@dataclass(slots=True)
class _Share:
    """What one kind of work holds, and who waits for more."""

    used: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class MemoryBudget:
    """Hands out at most `limit` bytes at a time, first come, first served.

    A reservation larger than what there is gets it when nothing else of its kind is reserved: work slows down, it is
    not refused. `on_change` is told the bytes in use after each change.

    Background work (base backups) holds its share for hours. It gets half of the budget at most, and nothing while
    other work (WAL) waits; and other work never waits for it to end, even if the limit is exceeded by one WAL file.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None] | None = None) -> None:
        self.limit = limit
        self._foreground, self._background = _Share(), _Share()
        self._on_change = on_change

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._foreground.used + self._background.used

    @asynccontextmanager
    async def reserve(self, size: int, *, background: bool = False) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget inside the context; wait for them first."""
        share = self._background if background else self._foreground
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        share.waiting.append((size, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                share.used -= size
            elif (size, granted) in share.waiting:
                share.waiting.remove((size, granted))
            self._grant()

    def _grant(self) -> None:
        self._grant_from(self._foreground, self.limit)
        if not self._foreground.waiting:
            self._grant_from(self._background, self.limit // 2)
        if self._on_change is not None:
            self._on_change(self.used)

    def _grant_from(self, share: _Share, most: int) -> None:
        while share.waiting:
            size, granted = share.waiting[0]
            if share.used and (share.used + size > most or self.used + size > self.limit):
                break
            share.waiting.popleft()
            if not granted.cancelled():  # else its waiter has been told, but has not had its turn yet
                share.used += size
                granted.set_result(None)
