"""Keeps known how the drills of the repository's base backups ended: they run in other pods, and are noted there."""

import structlog

from agent.domain.drill import DrillRecord
from agent.errors import RepositoryError
from agent.ports import Clock, ObjectStore
from agent.repository.drill_record import read_drills
from agent.repository.keys import BACKUP_FOLDER, backup_name_of_sentinel
from agent.telemetry.status import Drill, DrilledBackup, DrillsStatus, FailedDrill

REFRESH_SECONDS = 600.0

log = structlog.get_logger()


class DrillWatch:
    """Run it as a service."""

    name = "drill watch"

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._status: DrillsStatus | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self.refresh()
            except RepositoryError as error:
                log.warning("drills cannot be told", reason=error.one_line())
            await self._clock.sleep(REFRESH_SECONDS)

    def status(self) -> DrillsStatus | None:
        """Say how drills ended; None if that is not known yet."""
        return self._status

    async def refresh(self) -> None:
        """Look what drills have noted. The last ones stay known when their base backups are gone.

        Raises:
            RepositoryError: The repository could not be read.
        """
        keys = [info.key async for info in self._store.list_folder(BACKUP_FOLDER)]
        names = [name for key in keys if (name := backup_name_of_sentinel(key)) is not None]
        backups = [_drilled(name, record) for name, record in (await read_drills(self._store, names)).items()]
        before = [] if self._status is None else [DrilledBackup("", self._status.succeeded, self._status.failed)]
        known = [*before, *backups]
        self._status = DrillsStatus(
            succeeded=max(
                (each.succeeded for each in known if each.succeeded), key=lambda drill: drill.at, default=None
            ),
            failed=max((each.failed for each in known if each.failed), key=lambda drill: drill.at, default=None),
            backups=tuple(each for each in backups if each.succeeded or each.failed),
        )


def _drilled(name: str, record: DrillRecord) -> DrilledBackup:
    succeeded = failed = None
    if record.succeeded_at is not None and record.moment is not None and record.milliseconds is not None:
        succeeded = Drill(name, record.succeeded_at, record.moment, record.milliseconds / 1000)
    if record.failed_at is not None and record.exit_code is not None:
        failed = FailedDrill(name, record.failed_at, record.exit_code)
    return DrilledBackup(name, succeeded, failed)
