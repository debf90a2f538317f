"""Composition root of the agent: settings to adapters to services; runs them, stops them."""

import asyncio
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from importlib.metadata import version
from typing import Protocol

import structlog

from agent.archive.archiver import WalArchiver
from agent.archive.backlog_watch import BacklogWatch
from agent.archive.continuity import WalContinuity
from agent.archive.drain import Drain
from agent.archive.identity import IdentityGuard
from agent.archive.look_ahead import LookAhead
from agent.archive.window_watch import WindowWatch
from agent.backup.limits import BackupLimits
from agent.backup.runner import BackupRunner
from agent.backup.scheduler import BackupRules, BackupScheduler
from agent.backup.taker import BackupTaker
from agent.budget import MemoryBudget
from agent.domain.control_file import ClusterState
from agent.errors import ConfigError
from agent.expire.after_backup import ExpiryAfterBackup
from agent.expire.expiry import Expiry
from agent.fetch.fetcher import WalFetcher
from agent.fetch.read_ahead import ReadAhead, most_ahead
from agent.fetch.spool import Spool
from agent.idle_memory import IdleMemory
from agent.outside import Outside, outside
from agent.postgres.connection import PostgresServer
from agent.postgres.data_directory import DataDirectory
from agent.server.control_api import ControlApi
from agent.server.hook_api import HookApi
from agent.server.serving import allowed_uids, serve_http, serve_socket
from agent.settings import Settings
from agent.telemetry.findings import find
from agent.telemetry.status import AgentStatus, MemoryStatus, WalGap, WalStatus
from agent.verify.content import Reading
from agent.verify.drills import DrillWatch
from agent.verify.rounds import ReadingRounds, VerifyRules, low_priority
from agent.verify.watch import VerifyWatch

log = structlog.get_logger()


class Service(Protocol):
    """Something that works until it is cancelled."""

    name: str

    async def run(self) -> None:
        """Work until cancelled; returning is a failure."""


async def run_until(stop: asyncio.Event, services: Sequence[Service]) -> None:
    """Run `services` until `stop` is set or one of them ends; stop them in reverse order.

    No service ends by itself: one that fails, or returns, takes the agent down to be restarted whole.
    """

    async def forever(service: Service) -> None:
        await service.run()
        raise RuntimeError(f"service {service.name} returned")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(forever(service), name=service.name) for service in services]
        await stop.wait()
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait([task])


def drain_on_signals(asked: asyncio.Event, stop: asyncio.Event) -> None:
    """Set `asked` when the process is asked to end (SIGTERM, SIGINT), `stop` when it is asked again.

    SIGINT is no hurry: an image that is built on PostgreSQL's has it as its STOPSIGNAL, for a fast shutdown, and a
    container runtime sends that to the agent, too.
    """

    def terminate() -> None:
        (stop if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate)


class ArchiveAgent:
    """Archive mode, composed: serves the hooks, reads ahead, takes base backups."""

    def __init__(self, opened: Outside) -> None:
        settings, metrics, clock = opened.settings, opened.metrics, opened.clock
        self._opened = opened
        self._data_directory = DataDirectory(settings.require_data_directory())
        self._budget = budget = MemoryBudget(settings.memory_limit, metrics.memory_budget_used.set)
        self._guard = IdentityGuard(opened.store, opened.objects, opened.archive, self._data_directory)
        self.archiver = WalArchiver(
            opened.archive,
            self._data_directory,
            self._guard,
            concurrency=settings.upload_concurrency,
            budget=budget,
            clock=clock,
            metrics=metrics,
        )
        self.look_ahead = LookAhead(self.archiver, self._data_directory, clock, metrics)
        self.read_ahead = ReadAhead(
            opened.archive, Spool(self._data_directory.path), budget, most_ahead(settings.download_concurrency)
        )
        self.fetcher = WalFetcher(opened.archive, self.read_ahead, budget, clock, metrics)
        limits = BackupLimits(
            settings.upload_disk_concurrency,
            settings.tar_size_threshold,
            settings.backup_wal_timeout,
            budget,
            settings.disk_rate_limit,
            settings.network_rate_limit,
            settings.backup_nice,
        )
        postgres = PostgresServer(settings.postgres)
        taker = BackupTaker(
            opened.store,
            postgres,
            self._data_directory,
            opened.objects,
            limits,
            clock,
            metrics,
            settings.deltas,
            settings.backup_from,
        )
        rules = BackupRules(settings.backup_schedule, settings.backup_from, socket.gethostname())
        expiry = Expiry(opened.store, opened.archive, clock, metrics)
        self.expiry = ExpiryAfterBackup(expiry, settings.retention, clock)
        self.window = WindowWatch(opened.store, opened.archive, clock)
        self.verification = VerifyWatch(opened.store, opened.archive, clock)
        self.drills = DrillWatch(opened.store, clock)
        self.backups = BackupRunner(taker, postgres, self._data_directory, clock, taken=self._backup_taken)
        self.schedule = BackupScheduler(self.backups, rules, opened.store, postgres, self._data_directory, clock)
        self.continuity = WalContinuity(
            opened.store,
            opened.archive,
            self.archiver,
            self._guard,
            self._data_directory,
            self.schedule,
            clock,
            metrics,
        )
        self.watch = BacklogWatch(lambda: self.archiver.archived_bytes, self._data_directory, clock, metrics)
        self.reading = ReadingRounds(
            Reading(opened.store, opened.objects, opened.archive, 1, budget, low_priority()),
            VerifyRules(settings.verify_schedule, settings.verify_bytes_per_day),
            self._may_read_back,
            clock,
            metrics,
        )
        self._started_at, self._version = clock.now(), version("postgres-pitr")
        self._started = False

    async def run(self, asked: asyncio.Event, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, or `asked` is and all is drained.

        Raises:
            ConfigError: PGDATA, the socket or the HTTP port cannot be used.
            WalNotArchived: It was asked to end, and WAL of the stopped server could not be archived in time.
        """
        self._check_data_directory()
        settings, metrics, clock = self._opened.settings, self._opened.metrics, self._opened.clock
        drain = Drain(
            asked, stop, self.archiver, self.look_ahead, self._data_directory, clock,
            timeout_seconds=settings.drain_timeout,
        )  # fmt: skip
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(serve_http(settings, metrics, lambda: self._started, self.status))
            control = ControlApi(self.backups, self.status)
            hooks = HookApi(self.archiver, self.fetcher, self._data_directory, settings.request_timeout)
            routes = [*hooks.routes(), *control.routes()]
            await stack.enter_async_context(
                serve_socket(settings.socket, lambda: allowed_uids(self._data_directory), routes)
            )
            self._started = True
            log.info("agent started", socket=str(settings.socket), pgdata=str(self._data_directory.path))
            archiving: list[Service] = [
                self.archiver,
                self.look_ahead,
                self.read_ahead,
                self.watch,
                self.continuity,
                self.window,
                self.verification,
                self.drills,
                self.reading,
                IdleMemory(self._budget, clock),
            ]
            await run_until(stop, [*archiving, self.expiry, self.backups, self.schedule, drain])
        log.info("agent stopped")
        if drain.problem is not None:
            raise drain.problem

    def _check_data_directory(self) -> None:
        path = self._data_directory.path
        try:
            is_mounted = path.exists() or path.parent.exists()
            is_initialised = self._data_directory.exists()
        except OSError as error:
            raise ConfigError(
                f"PGDATA={path} cannot be read: {error.strerror}",
                hint="Run the agent as the user that PostgreSQL runs as (runAsUser, usually 999), on its volume.",
            ) from error
        if not is_mounted:
            raise ConfigError(
                f"PGDATA={path} does not exist, nor does {path.parent}",
                hint="Mount PostgreSQL's data volume into this container.",
            )
        if not is_initialised:
            log.warning("data directory is not initialised yet", pgdata=str(path))

    def _may_read_back(self) -> bool:
        """Tell whether this agent is the primary's, and does not take a base backup."""
        if self.backups.running is not None or self._data_directory.postmaster_status() != "ready":
            return False
        try:
            return self._data_directory.control_file().state is ClusterState.IN_PRODUCTION
        except ConfigError:
            return False

    def _backup_taken(self) -> None:
        self.expiry.ask()
        self.window.look_again()
        self.verification.ask()

    def status(self) -> AgentStatus:
        """Say how the agent is, now."""
        status = AgentStatus(
            mode="archive",
            version=self._version,
            started_at=self._started_at,
            now=self._opened.clock.now(),
            wal=self._wal_status(),
            backups=self.schedule.status(),
            window=self.window.status(),
            store=self._opened.health.status(self._guard.foreign),
            memory=MemoryStatus(self._budget.limit, self._budget.used),
            expiry=self.expiry.status(),
            verification=self.verification.status(),
            reading=self.reading.status(),
            drills=self.drills.status(),
        )
        return replace(status, findings=find(status))

    def _wal_status(self) -> WalStatus:
        trend = self.watch.trend
        return WalStatus(
            last_archived=self.archiver.last_archived,
            last_fetched=self.fetcher.last_fetched,
            backlog_files=self.look_ahead.backlog_files,
            backlog_bytes=self.look_ahead.backlog_bytes,
            backlog_oldest_seconds=round(self.look_ahead.oldest_ready_seconds, 1),
            gaps=tuple(WalGap(gap.first, gap.last, len(gap.numbers)) for gap in self.continuity.gaps),
            last_archived_at=self.archiver.last_archived_at,
            failure=self.archiver.failure,
            is_primary=self.watch.is_primary,
            written_bytes_per_second=None if trend is None else round(trend.written_rate),
            archived_bytes_per_second=None if trend is None else round(trend.archived_rate),
            volume_free_bytes=self.watch.free_bytes,
            seconds_until_full=None if trend is None else trend.seconds_until_full,
            awaited=self.fetcher.awaited,
        )


async def run_archive_mode(settings: Settings) -> None:
    """Run the agent beside a primary until it is told to end.

    SIGTERM, SIGINT: when PostgreSQL has ended and its WAL is archived, soon if PostgreSQL goes on; see `Drain`. A
    second one: at once.

    Raises:
        ConfigError: PGDATA, the socket or the HTTP port cannot be used.
        WalNotArchived: WAL of the stopped server could not be archived in time.
        RepositoryRefused: There are no credentials, or the endpoint is no address.
    """
    asked, stop = asyncio.Event(), asyncio.Event()
    drain_on_signals(asked, stop)
    async with outside(settings) as opened:
        await ArchiveAgent(opened).run(asked, stop)
