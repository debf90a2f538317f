"""Gives a base backup up when PostgreSQL is told to stop.

A smart shutdown, which is what SIGTERM asks of PostgreSQL, waits until every session has ended. That of a base backup
would hold it up until Kubernetes kills the server.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent.errors import BackupFailed
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.tasks import in_thread, task_group

POLL_SECONDS = 1.0


@asynccontextmanager
async def until_shutdown(data_directory: DataDirectory, clock: Clock) -> AsyncIterator[None]:
    """Cancel what runs inside the context when the server of `data_directory` begins to stop.

    Raises:
        BackupFailed: It began to stop.
    """
    async with task_group() as group:
        watch = group.create_task(_until_stopping(data_directory, clock), name="wait for PostgreSQL to stop")
        yield
        watch.cancel()


async def _until_stopping(data_directory: DataDirectory, clock: Clock) -> None:
    while await in_thread(data_directory.postmaster_status) != "stopping":
        await clock.sleep(POLL_SECONDS)
    raise BackupFailed(
        "the base backup was given up, because PostgreSQL is stopping", hint="Take another when it runs again."
    )
