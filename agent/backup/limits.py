"""How much a base backup may use, and how it keeps to that."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from agent.budget import MemoryBudget
from agent.ports import Clock


@dataclass(frozen=True, slots=True)
class BackupLimits:
    """How much a base backup may use.

    parallel_parts: tar parts packed and uploaded at once, if the memory allows.
    part_bytes: a part is closed when its content exceeds this.
    wal_seconds: how long to wait, after the backup, for its WAL to be archived.
    memory: the budget that WAL archiving has a share of, too.
    disk_rate, network_rate: bytes a second that are read, and that are sent; None: as fast as it goes.
    nice: added to the priority of the threads that read, pack and encrypt: 0 to 19, the latter being the lowest.
    """

    parallel_parts: int
    part_bytes: int
    wal_seconds: float
    memory: MemoryBudget = field(default_factory=lambda: MemoryBudget(256 << 20))
    disk_rate: int | None = None
    network_rate: int | None = None
    nice: int = 0

    def threads(self) -> ThreadPoolExecutor:
        """Return threads of the backup's own, one for each part and one for what is between them."""
        return ThreadPoolExecutor(self.parallel_parts + 1, "backup", initializer=self._lower_priority)

    def _lower_priority(self) -> None:
        """Lower the calling thread's priority: for CPU, and with it for I/O, which Linux derives from it.

        Source: setpriority(2), "the nice value is a per-thread attribute"; ioprio_set(2), "Notes" on the default.
        """
        if self.nice:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(self.nice + os.nice(0), 19))


class RateLimit:
    """Lets `bytes_per_second` pass, evenly over any second or so; None lets everything pass."""

    def __init__(self, bytes_per_second: int | None, clock: Clock) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._free_at = 0.0

    async def passed(self, size: int) -> None:
        """Return when whoever has just let `size` bytes pass may go on. Several tasks share the rate."""
        if self._rate is None or not size:
            return
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now) + size / self._rate
        await self._clock.sleep(self._free_at - now)
