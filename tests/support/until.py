"""Waiting for a condition on the event loop."""

import asyncio
from collections.abc import Callable


async def until(holds: Callable[[], bool], *, what: str = "a condition", seconds: float = 60) -> None:
    """Return when `holds()`; fail after `seconds`, naming what was waited for."""
    try:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110 - nobody signals what a test may wait for
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {seconds:g} s for {what}") from None
