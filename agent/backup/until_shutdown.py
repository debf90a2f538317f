"""Gives a base backup up when PostgreSQL is told to stop.

A smart shutdown, which is what SIGTERM asks of PostgreSQL, waits until every session has ended. That of a base backup
would hold it up until Kubernetes kills the server.
"""

from agent.backup.taker import BackupTaker
from agent.domain.catalog import Backup
from agent.domain.delta_parent import BackupKind
from agent.errors import BackupFailed
from agent.ports import Clock
from agent.postgres.data_directory import DataDirectory
from agent.tasks import in_thread, task_group
from agent.telemetry.progress import ReportProgress

POLL_SECONDS = 1.0


class BackupsUntilShutdown:
    """Takes base backups of a server as long as it is not stopping."""

    def __init__(self, taker: BackupTaker, data_directory: DataDirectory, clock: Clock) -> None:
        self._taker = taker
        self._data_directory = data_directory
        self._clock = clock

    @property
    def is_running(self) -> bool:
        """Whether a base backup is being taken."""
        return self._taker.is_running

    async def take(self, report: ReportProgress, kind: BackupKind = BackupKind.AUTO) -> Backup:
        """Take a base backup, see `BackupTaker.take`.

        Raises:
            BackupFailed: It was given up; also when PostgreSQL began to stop.
        """
        async with task_group() as group:
            watch = group.create_task(self._until_stopping(), name="wait for PostgreSQL to stop")
            backup = await self._taker.take(report, kind)
            watch.cancel()
        return backup

    async def _until_stopping(self) -> None:
        while await in_thread(self._data_directory.postmaster_status) != "stopping":
            await self._clock.sleep(POLL_SECONDS)
        raise BackupFailed(
            "the base backup was given up, because PostgreSQL is stopping", hint="Take another when it runs again."
        )
