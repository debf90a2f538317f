"""A base backup keeps to the rate and the priority that it is given."""

import asyncio
import os
import threading
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from agent.backup.limits import BackupLimits, RateLimit


class CountingClock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 5.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@given(st.lists(st.integers(0, 1 << 24), min_size=1), st.integers(1, 1 << 30))
def test_what_passes_takes_its_time(sizes: list[int], rate: int) -> None:
    async def run() -> None:
        clock = CountingClock()
        limit = RateLimit(rate, clock)
        for size in sizes:
            await limit.passed(size)
        expected = sum(sizes) / rate
        assert abs(clock.seconds - 5.0 - expected) <= 1e-6 * max(expected, 1)

    asyncio.run(run())


async def test_time_spent_otherwise_is_not_made_up_for_in_a_burst() -> None:
    clock = CountingClock()
    limit = RateLimit(100, clock)
    await limit.passed(100)
    clock.seconds += 1000
    await limit.passed(100)
    assert clock.seconds == 5 + 1 + 1000 + 1


async def test_without_a_limit_nothing_waits() -> None:
    clock = CountingClock()
    await RateLimit(None, clock).passed(1 << 40)
    assert clock.seconds == 5.0


def test_only_the_threads_of_a_backup_have_a_lower_priority() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with BackupLimits(2, 1, 1, nice=3).threads() as threads:
        inside = threads.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert inside == min(before + 3, 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
