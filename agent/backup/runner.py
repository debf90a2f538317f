"""The one way to a base backup in this process: one runs at a time, and whoever wants may follow or cancel it.

Of several agents beside one server one takes it: an advisory lock on that server is held from before the repository
is looked at until the sentinel is stored.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Protocol

import structlog

from agent.backup.order import BackupOrder
from agent.backup.until_shutdown import until_shutdown
from agent.domain.catalog import Backup
from agent.domain.delta_parent import BackupKind
from agent.errors import AgentError, BackupElsewhere, BackupFailed, library_missing
from agent.ports import Clock, Postgres
from agent.postgres.data_directory import DataDirectory
from agent.tasks import task_group
from agent.telemetry.progress import CHECKPOINT_STAGE, Pace, Progress, ProgressLog, ReportProgress
from agent.telemetry.status import FailedBackup, RunningBackup

PROGRESS_LOG_SECONDS = 60.0

log = structlog.get_logger()


class TakesBackups(Protocol):
    """Takes a base backup of the server."""

    async def take(self, report: ReportProgress, kind: BackupKind, *, permanent: bool, fast: bool) -> Backup:
        """Return when its sentinel is stored; raise `BackupFailed` if it was given up, leaving nothing listed.

        fast: begin with a checkpoint that is written at once.
        """


class BackupRun:
    """One base backup, from its order to its end. It goes on whether or not anybody follows it."""

    def __init__(self, order: BackupOrder, clock: Clock) -> None:
        self.order = order
        self.started_at = clock.now()
        self._clock = clock
        self._begun = clock.monotonic()
        self._pace = Pace(clock.monotonic)
        self._log = ProgressLog("base backup progress", clock.monotonic, seconds=PROGRESS_LOG_SECONDS)
        self.task: asyncio.Task[Backup | AgentError | None] | None = None

    def report(self, progress: Progress) -> None:
        """Take how far it is; a `ReportProgress`."""
        self._pace.report(progress)
        self._log.report(progress)

    async def ended(self, seconds: float | None = None) -> bool:
        """Tell whether it has ended, after waiting at most `seconds` for that."""
        assert self.task is not None
        done, _ = await asyncio.wait([self.task], timeout=seconds)
        return bool(done)

    def result(self) -> Backup | None:
        """Return the base backup; None if none was needed any more. Only for a run that has ended.

        Raises:
            BackupFailed: It was given up.
            AgentError: It could not begin: the server or the repository could not be asked.
        """
        assert self.task is not None
        if self.task.cancelled():
            raise BackupFailed("the base backup was given up: it was cancelled, or the agent is stopping")
        outcome = self.task.result()
        if isinstance(outcome, AgentError):
            raise outcome
        return outcome

    def status(self) -> RunningBackup:
        """Say how far it is."""
        progress, left = self._pace.progress, self._pace.seconds_left
        return RunningBackup(
            kind=self.order.kind,
            why=self.order.why,
            permanent=self.order.permanent,
            started_at=self.started_at,
            seconds=round(self._clock.monotonic() - self._begun, 1),
            stage=progress.stage,
            done_bytes=progress.done,
            total_bytes=progress.total,
            ratio=round(progress.ratio, 4),
            bytes_per_second=None if self._pace.rate is None else round(self._pace.rate),
            seconds_left=None if left is None else round(left, 1),
            # How long a checkpoint takes is PostgreSQL's setting.
            idle_seconds=0.0 if progress.stage == CHECKPOINT_STAGE else round(self._pace.idle_seconds, 1),
        )


class BackupRunner:
    """Runs base backups, one at a time. A service: ended, it gives up the one that runs, and waits for that."""

    name = "base backups"

    def __init__(
        self,
        taker: TakesBackups,
        postgres: Postgres,
        data_directory: DataDirectory,
        clock: Clock,
        *,
        taken: Callable[[], None] = lambda: None,
    ) -> None:
        """`taken` is called after each base backup that was completed; it must return at once."""
        self.last_failure: FailedBackup | None = None
        self.given_up_at: datetime | None = None
        self.failures = 0  # in a row
        self.on_ended: Callable[[], None] = lambda: None  # called whenever a base backup has ended, however it did
        self._taker = taker
        self._postgres = postgres
        self._data_directory = data_directory
        self._clock = clock
        self._taken = taken
        self._run: BackupRun | None = None
        self._group: asyncio.TaskGroup | None = None

    @property
    def running(self) -> BackupRun | None:
        """The base backup that is being taken."""
        return self._run

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with task_group() as self._group:
                await asyncio.Event().wait()
        finally:
            self._group = None

    def start(self, order: BackupOrder, *, if_still: Callable[[], Awaitable[bool]] | None = None) -> BackupRun:
        """Begin the base backup, and return it; while one runs, return that one instead.

        if_still: asked, once no other agent of this server can begin one, whether it is still wanted.

        Raises:
            BackupFailed: The agent is starting or stopping.
        """
        if self._run is not None:
            return self._run
        if self._group is None:
            raise BackupFailed("the agent is starting or stopping", hint="Try again when it runs.")
        run = self._run = BackupRun(order, self._clock)
        run.task = self._group.create_task(self._take(run, if_still), name="base backup")
        run.task.add_done_callback(self._forget)
        return run

    async def cancel(self) -> bool:
        """Give up the base backup that runs; return, once nothing is left of it, whether there was one."""
        run = self._run
        if run is None or run.task is None:
            return False
        log.warning("base backup cancelled by request")
        run.task.cancel()
        await run.ended()
        if run.task.cancelled():
            self.given_up_at = self._clock.now()
        return True

    def _forget(self, _task: object) -> None:
        self._run = None
        self.on_ended()

    async def _take(self, run: BackupRun, if_still: Callable[[], Awaitable[bool]] | None) -> Backup | AgentError | None:
        """Return how it ended: nothing but cancellation leaves this, so that the agent goes on."""
        log.info("base backup begun", why=run.order.why, kind=run.order.kind)
        try:
            async with until_shutdown(self._data_directory, self._clock), self._postgres.only_backup():
                if if_still is not None and not await if_still():
                    return None
                order = run.order
                backup = await self._taker.take(
                    run.report, order.kind, permanent=order.permanent, fast=order.why.is_urgent
                )
        except BackupElsewhere as error:
            return error
        except AgentError as error:
            return self._failed(error)
        except ImportError as error:
            return self._failed(library_missing(error))
        except Exception as error:
            log.exception("base backup broke")
            return self._failed(BackupFailed(f"internal error {type(error).__name__}; see the agent's log"))
        self.failures = 0
        self._taken()
        return backup

    def _failed(self, error: AgentError) -> AgentError:
        self.failures += 1
        self.last_failure = FailedBackup(self._clock.now(), error.one_line(), self.failures)
        log.error("base backup failed", reason=error.one_line(), failures_in_a_row=self.failures)
        return error
