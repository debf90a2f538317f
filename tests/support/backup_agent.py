"""The base backup side of an agent: schedule, runner and taker, beside a server; the test sets the time of day."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from agent.backup.runner import BackupRunner
from agent.backup.scheduler import BackupRules, BackupScheduler
from agent.domain.backup_schedule import BackupFrom, BackupSchedule, Why
from agent.postgres.data_directory import DataDirectory
from agent.storage.clock import SystemClock
from agent.tasks import task_group
from tests.support.base_backup import BackupLab
from tests.support.until import until

DAILY = BackupSchedule("0 2 * * *")


class MovedClock(SystemClock):
    """The time of day as the test sets it."""

    def __init__(self) -> None:
        self.moved = timedelta()

    def now(self) -> datetime:
        return super().now() + self.moved

    def move_to(self, moment: datetime) -> None:
        self.moved = moment - super().now()


class HastyClock(SystemClock):
    """The time of day of another clock; what is to be done again in a minute is done in three seconds."""

    def __init__(self, clock: MovedClock) -> None:
        self._clock = clock

    def now(self) -> datetime:
        return self._clock.now()

    def monotonic(self) -> float:
        return 20 * super().monotonic()

    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.05))


@dataclass
class BackupAgent:
    """The base backup side of one agent beside the lab's server."""

    lab: BackupLab
    clock: MovedClock
    schedule: BackupSchedule | None = DAILY
    take_from: BackupFrom = BackupFrom.PRIMARY
    runner: BackupRunner = field(init=False)
    scheduler: BackupScheduler = field(init=False)

    def __post_init__(self) -> None:
        lab, postgres, hasty = self.lab, self.lab.server(), HastyClock(self.clock)
        data_directory = DataDirectory(lab.cluster.data_directory)
        self.runner = BackupRunner(
            lab.taker(clock=self.clock, take_from=self.take_from), postgres, data_directory, hasty
        )
        rules = BackupRules(self.schedule, self.take_from, "pg-0")
        self.scheduler = BackupScheduler(self.runner, rules, lab.store, postgres, data_directory, hasty)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["BackupAgent"]:
        """Run its services inside the context."""
        async with task_group() as group:
            tasks = [group.create_task(each.run()) for each in (self.runner, self.scheduler)]
            yield self
            for task in reversed(tasks):
                task.cancel()

    async def plans(self, at: datetime, why: Why) -> None:
        """Return when it plans just this."""
        await until(lambda: self.planned() == (at, why), what=f"{why} at {at}, not {self.scheduler.status()}")

    def planned(self) -> tuple[datetime, str] | None:
        planned = self.scheduler.status().next
        return None if planned is None else (planned.at, planned.why)

    async def plans_after(self, moment: datetime) -> None:
        """Return when what it plans is later than `moment`."""
        await until(
            lambda: (planned := self.planned()) is not None and planned[0] > moment,
            what=f"a plan after {moment}, not {self.scheduler.status()}",
        )
