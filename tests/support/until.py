"""Waiting for a condition on the event loop, and for the clock."""

import asyncio
import time
from collections.abc import Callable

from agent.lab.waiting import wait_until


async def until(holds: Callable[[], bool], *, what: str = "a condition", seconds: float = 60) -> None:
    """Return when `holds()`; fail after `seconds`, naming what was waited for."""
    try:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110 - nobody signals what a test may wait for
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {seconds:g} s for {what}") from None


def next_second() -> None:
    """Return in another second: S3 tells times to the second, and expiry calls none of two in one second newer."""
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second, seconds=60, what="the next second")
