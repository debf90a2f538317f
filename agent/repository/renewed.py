"""An object that says something only as long as it is renewed: one that a killed agent leaves behind ends by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from agent.errors import RepositoryError
from agent.ports import Clock, ObjectStore
from agent.tasks import task_group

_END_SECONDS = 5.0

log = structlog.get_logger()


@asynccontextmanager
async def renewed(
    store: ObjectStore, key: str, body: bytes, clock: Clock, seconds: float, what: str
) -> AsyncIterator[None]:
    """Store the object `key`, which is there, again every `seconds` inside the context; then delete it.

    What fails of that is told as of `what`, or left to the object's age.
    """

    async def renew() -> None:
        while True:
            await clock.sleep(seconds)
            try:
                await store.put(key, body)
            except RepositoryError as error:
                log.warning(f"{what} was not renewed", reason=error.one_line())

    try:
        async with task_group() as group:
            renewing = group.create_task(renew(), name=what)
            yield
            renewing.cancel()
    finally:
        with suppress(RepositoryError, TimeoutError):  # it ends by itself
            async with asyncio.timeout(_END_SECONDS):
                await store.delete([key])
