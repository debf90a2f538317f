"""Composition root of restores: `pitr restore`, restore mode, and `pitr drill`."""

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from agent.budget import MemoryBudget
from agent.domain.drill import DrillRecord
from agent.errors import AgentError, RepositoryUnavailable, RestoreFailed, RestoreInterrupted
from agent.fetch.fetcher import WalFetcher
from agent.fetch.read_ahead import ReadAhead, most_ahead
from agent.fetch.spool import Spool
from agent.outside import Outside, outside
from agent.postgres.data_directory import DataDirectory
from agent.postgres.postmaster import refuse_root
from agent.repository.drill_record import write_drill
from agent.repository.key_check import refuse_other_key
from agent.restore.drill import DrillOutcome, discard_drill, drill_settings, left_by_a_drill, plan_drill
from agent.restore.outcome import RestoreOutcome
from agent.restore.restorer import Restorer
from agent.server.hook_api import HookApi
from agent.server.serving import allowed_uids, serve_http, serve_socket
from agent.server.unix_socket import lock_of
from agent.settings import Settings
from agent.storage.clock import SystemClock
from agent.tasks import in_thread
from agent.telemetry.progress import ReportProgress
from agent.telemetry.push import Values, push
from agent.telemetry.status import RestoreModeStatus

_NO_VERDICT = (RepositoryUnavailable, RestoreInterrupted)  # no drill failed


async def restore(settings: Settings, report: ReportProgress, *, http: bool = False) -> RestoreOutcome:
    """Restore what the settings name into PGDATA; with `http`, serve metrics, health and status meanwhile.

    SIGTERM and SIGINT interrupt it in order: PostgreSQL, if it runs, is stopped. However it ends, the Pushgateway is
    told.

    Raises:
        RestoreFailed: It was given up or interrupted; the same request goes on where it stopped.
        AgentError: Any other of the ways in which a restore cannot be.
    """
    try:
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(outside(settings))
            outcome = await _restore(stack, opened, report, http=http)
    except AgentError as error:
        await _tell(settings, "pitr_restore", _failed_restore(error), keep_others=False)
        raise
    await _tell(settings, "pitr_restore", _ended_restore(outcome), keep_others=False)
    return outcome


async def drill(settings: Settings, report: ReportProgress, *, seed: int | None = None) -> DrillOutcome:
    """Restore the newest base backup to a moment at random into PGDATA, check it, and remove it.

    How it ended is noted beside the base backup, for the agent of the server, and told to the Pushgateway; nothing if
    the store was away, or a signal ended it: that says nothing of the base backup.

    Args:
        settings: The repository, where to, and the checks; no target is taken from them.
        report: Is told the progress.
        seed: Of the choice of the moment: with the same one, and the same repository, it is the same.

    Raises:
        AgentError: As `restore`; what was restored is then left to be looked at, until the next drill.
    """
    try:
        outcome = await _drill(settings, report, random.Random(seed).random())  # noqa: S311 - nothing secret
    except _NO_VERDICT:
        raise
    except AgentError:
        failed: Values = {"pitr_drill_last_failure_timestamp_seconds": SystemClock().now().timestamp()}
        await _tell(settings, "pitr_drill", failed, keep_others=True)
        raise
    await _tell(settings, "pitr_drill", _ended_drill(outcome), keep_others=True)
    return outcome


async def _drill(settings: Settings, report: ReportProgress, share: float) -> DrillOutcome:
    refuse_root()
    path = settings.require_data_directory()
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(outside(settings))
        await opened.store.check()
        await refuse_other_key(opened.store, opened.objects)
        await _discard(path, await in_thread(left_by_a_drill, path))
        choice = await plan_drill(opened.store, opened.archive, share)
        try:
            drilled = await drill_settings(opened.store, settings, choice)
            outcome = await _restore(stack, replace(opened, settings=drilled), report, http=False)
        except RestoreInterrupted as error:
            raise RestoreInterrupted(
                "the drill was interrupted", hint="Run it again: it removes what is there, and begins anew."
            ) from error
        except RepositoryUnavailable:
            raise
        except AgentError as error:
            if isinstance(error, RestoreFailed) and opened.health.failing_since is not None:
                raise RepositoryUnavailable(
                    f"{error.message}; meanwhile: {opened.health.reason}",
                    hint="That says nothing of the base backup: drill again once the store answers.",
                ) from error
            failed = DrillRecord(failed_at=opened.clock.now(), exit_code=error.exit_code)
            await write_drill(opened.store, choice.backup, failed)
            raise
        seconds = sum(value for stage, value in outcome.seconds.items() if stage != "validating")
        succeeded = DrillRecord(opened.clock.now(), choice.moment, round(1000 * seconds))
        await write_drill(opened.store, choice.backup, succeeded)
        await _discard(path, drilled.tablespace_map)
    return DrillOutcome(choice.moment, round(seconds, 3), outcome)


async def _discard(path: Path, tablespace_map: Mapping[str, str]) -> None:
    try:
        await in_thread(discard_drill, path, tablespace_map)
    except OSError as error:
        raise RestoreFailed(
            f"what a drill left in {path} cannot be removed: {error.filename}: {error.strerror}",
            hint="Remove it, then drill again.",
        ) from error


async def _restore(stack: AsyncExitStack, opened: Outside, report: ReportProgress, *, http: bool) -> RestoreOutcome:
    """Run a restore until it ends, or a signal comes; what it needs meanwhile is entered into `stack`."""
    restorer: Restorer | None = None
    fetcher: WalFetcher | None = None
    started_at = opened.clock.now()

    def status() -> RestoreModeStatus:
        return RestoreModeStatus(
            "restore",
            version("postgres-pitr"),
            started_at,
            opened.clock.now(),
            None if restorer is None else restorer.status(),
            None if fetcher is None else fetcher.awaited,
            opened.health.status(None),
        )

    if http:
        await stack.enter_async_context(serve_http(opened.settings, opened.metrics, lambda: True, status=status))
    await opened.store.check()
    await refuse_other_key(opened.store, opened.objects)
    budget = MemoryBudget(opened.settings.memory_limit, opened.metrics.memory_budget_used.set)
    fetcher, socket = await stack.enter_async_context(_serve_replay(opened, budget))
    restorer = Restorer(
        opened.settings,
        opened.store,
        opened.objects,
        opened.archive,
        clock=opened.clock,
        metrics=opened.metrics,
        budget=budget,
        hook_environment={"PITR_SOCKET": str(socket)},
    )
    stop, work = asyncio.Event(), asyncio.create_task(restorer.run(report), name="restore")
    _stop_on_signals(stop)
    stopped = asyncio.create_task(stop.wait(), name="wait for a signal")
    try:
        await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, stopped):
            task.cancel()
        await asyncio.wait([work, stopped])
    if work.cancelled():
        raise RestoreInterrupted("the restore was interrupted", hint="Run it again: it goes on where it stopped.")
    return work.result()


async def _tell(settings: Settings, job: str, values: Values, *, keep_others: bool) -> None:
    if settings.pushgateway is not None:
        await push(settings.pushgateway, job, settings.repository, values, keep_others=keep_others)


def _failed_restore(error: AgentError) -> Values:
    return {
        "pitr_restore_success": 0,
        "pitr_restore_exit_code": error.exit_code,
        "pitr_restore_finished_timestamp_seconds": SystemClock().now().timestamp(),
    }


def _ended_restore(outcome: RestoreOutcome) -> Values:
    last_commit_at = outcome.last_commit_at
    return {
        "pitr_restore_success": 1,
        "pitr_restore_exit_code": 0,
        "pitr_restore_finished_timestamp_seconds": SystemClock().now().timestamp(),
        "pitr_restore_restored_to_timestamp_seconds": None if last_commit_at is None else last_commit_at.timestamp(),
        "pitr_restore_timeline": outcome.new_timeline or outcome.timeline,
        "pitr_restore_duration_seconds": sum(outcome.seconds.values()),
        "pitr_restore_stage_seconds": outcome.seconds,
        "pitr_restore_base_backup_bytes": outcome.backup_bytes,
        "pitr_restore_wal_bytes": outcome.wal_bytes,
    }


def _ended_drill(outcome: DrillOutcome) -> Values:
    return {
        "pitr_drill_last_success_timestamp_seconds": SystemClock().now().timestamp(),
        "pitr_drill_duration_seconds": outcome.seconds,
        "pitr_drill_moment_timestamp_seconds": outcome.moment.timestamp(),
        "pitr_drill_stage_seconds": outcome.restored.seconds,
    }


@asynccontextmanager
async def _serve_replay(opened: Outside, budget: MemoryBudget) -> AsyncIterator[tuple[WalFetcher, Path]]:
    """Serve restore_command on a socket of its own inside the context; yield who answers, and the socket.

    Of its own, because an agent may run on PITR_SOCKET, for another server. Beside it, because nothing else may be
    writable in a container; else in a directory that nobody else may enter.
    """
    settings = opened.settings
    data_directory = DataDirectory(settings.require_data_directory())
    ahead = ReadAhead(opened.archive, Spool(data_directory.path), budget, most_ahead(settings.download_concurrency))
    fetcher = WalFetcher(opened.archive, ahead, budget, opened.clock, opened.metrics)
    routes = HookApi(None, fetcher, data_directory, settings.request_timeout).routes()
    home = settings.socket.parent
    with ExitStack() as stack:
        if not os.access(home, os.W_OK | os.X_OK):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pitr-")))
        path = home / f"pitr-restore-{os.getpid()}.sock"
        reading_ahead = asyncio.create_task(ahead.run(), name=ahead.name)
        try:
            async with serve_socket(path, lambda: allowed_uids(data_directory), routes):
                yield fetcher, path
        finally:
            reading_ahead.cancel()
            await asyncio.wait([reading_ahead])
            lock_of(path).unlink(missing_ok=True)  # nobody else uses a name with our process id


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` when the process is asked to end (SIGTERM, SIGINT)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
