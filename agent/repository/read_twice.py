"""Reads a second time what looks damaged."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from agent.errors import RepositoryCorrupt

T = TypeVar("T")

log = structlog.get_logger()


async def read_twice(read: Callable[[], Awaitable[T]], event: str, **of: str) -> T:
    """Return what `read` does, called again if it first finds damage, which `event` of `of` then tells the log.

    A body damaged on the way looks like a damaged object: only a second reading tells them apart.

    Raises:
        RepositoryCorrupt: It is damaged.
    """
    try:
        return await read()
    except RepositoryCorrupt as error:
        log.warning(event, **of, reason=error.one_line())
        return await read()
