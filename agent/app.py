"""Composition root: settings to adapters to services; runs them, stops them."""

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

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
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_rates import RestoreEstimate, estimate_restore
from agent.errors import ConfigError
from agent.expire.after_backup import ExpiryAfterBackup
from agent.expire.expiry import Expiry
from agent.fetch.fetcher import WalFetcher
from agent.fetch.read_ahead import ReadAhead
from agent.fetch.spool import Spool
from agent.ports import Clock, ObjectStore
from agent.postgres.connection import PostgresServer
from agent.postgres.data_directory import DataDirectory
from agent.repository.backups import read_catalog
from agent.repository.key_check import refuse_other_key
from agent.repository.object_format import ObjectFormat
from agent.repository.restore_record import read_restore_rates
from agent.repository.wal_archive import WalArchive
from agent.restore.planner import plan_from_repository
from agent.restore.preflight import preflight
from agent.server.answers import errors_as_answers, only_peers
from agent.server.control_api import ControlApi
from agent.server.hook_api import HookApi
from agent.server.http import http_application
from agent.server.unix_socket import bound_socket, lock_of
from agent.settings import Settings
from agent.storage.clock import SystemClock
from agent.storage.connect import open_store
from agent.storage.health import StoreHealth
from agent.telemetry.findings import find
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AgentStatus, MemoryStatus, RestoreModeStatus, WalGap, WalStatus
from agent.verify.content import Reading
from agent.verify.drills import DrillWatch
from agent.verify.rounds import ReadingRounds, VerifyRules, low_priority
from agent.verify.watch import VerifyWatch

SHUTDOWN_SECONDS = 5.0  # for answers under way when the agent stops
# Replay takes 80 ms and more for a segment, a download less: two ahead hide it, one more covers a slow one.
READ_AHEAD_SEGMENTS = 3
PLAN_RETRY_SECONDS = 10.0  # a person waits: tell an unreachable store soon

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


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` when the process is asked to end (SIGTERM, SIGINT)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def drain_on_signals(asked: asyncio.Event, stop: asyncio.Event) -> None:
    """Set `asked` when the process is to end in its time (SIGTERM), `stop` if at once (SIGINT, or asked again)."""

    def terminate() -> None:
        (stop if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGINT, stop.set)


@dataclass(frozen=True)
class Outside:
    """The adapters that every command needs, opened from the settings."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    store: ObjectStore
    objects: ObjectFormat
    archive: WalArchive
    health: StoreHealth


@asynccontextmanager
async def outside(settings: Settings, *, retry_seconds: float | None = None) -> AsyncIterator[Outside]:
    """Open the repository and what belongs to it; close it on leaving the context.

    Failing requests are retried for `retry_seconds`, by default as long as the settings say.
    """
    clock, metrics = SystemClock(), Metrics(CollectorRegistry())
    health = StoreHealth(clock)
    store = await open_store(settings, metrics, clock, retry_seconds=retry_seconds, health=health)
    objects = ObjectFormat(settings.compression, settings.libsodium_key)
    archive = WalArchive(store, objects, digest_is_kept=settings.s3 is not None)  # a directory keeps no metadata
    try:
        yield Outside(settings, clock, metrics, store, objects, archive, health)
    finally:
        await store.close()


@asynccontextmanager
async def serve_socket(
    path: Path, allowed: Callable[[], set[int]], routes: Sequence[web.RouteDef]
) -> AsyncIterator[None]:
    """Serve `routes` on the unix socket at `path` to peers of the `allowed` uids, inside the context."""
    application = web.Application(middlewares=[only_peers(allowed), errors_as_answers()])
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    with bound_socket(path) as listener:
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()


@asynccontextmanager
async def serve_http(
    settings: Settings,
    metrics: Metrics,
    is_started: Callable[[], bool],
    status: Callable[[], AgentStatus | RestoreModeStatus] | None = None,
) -> AsyncIterator[None]:
    """Serve metrics, health and, of `status`, the page on PITR_HTTP_LISTEN inside the context.

    Raises:
        ConfigError: The address cannot be bound.
    """
    runner = web.AppRunner(http_application(metrics, is_started, status), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.http_host, settings.http_port).start()
        except OSError as error:
            raise ConfigError(
                f"PITR_HTTP_LISTEN={settings.http_host}:{settings.http_port} cannot be bound: {error.strerror}",
                hint="Choose a free port.",
            ) from error
        yield
    finally:
        await runner.cleanup()


def allowed_uids(data_directory: DataDirectory) -> set[int]:
    """Return who may use the socket: root, the agent's own user, and the owner of the data directory."""
    allowed = {0, os.geteuid()}
    with contextlib.suppress(ConfigError):  # not mounted or initialised yet
        allowed.add(data_directory.owner())
    return allowed


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
        self.read_ahead = read_ahead(opened, self._data_directory, budget)
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
            self._data_directory.path,
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
            ]
            await run_until(stop, [*archiving, self.expiry, self.backups, self.schedule, drain])
        log.info("agent stopped")
        if drain.problem is not None:
            raise drain.problem

    def _check_data_directory(self) -> None:
        path = self._data_directory.path
        if not path.exists() and not path.parent.exists():
            raise ConfigError(
                f"PGDATA={path} does not exist, nor does {path.parent}",
                hint="Mount PostgreSQL's data volume into this container.",
            )
        if not self._data_directory.exists():
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
        )


async def run_archive_mode(settings: Settings) -> None:
    """Run the agent beside a primary until it is told to end.

    SIGTERM: when PostgreSQL has ended and its WAL is archived, soon if PostgreSQL goes on; see `Drain`. SIGINT, or a
    second SIGTERM: at once.

    Raises:
        ConfigError: PGDATA, the socket or the HTTP port cannot be used.
        WalNotArchived: WAL of the stopped server could not be archived in time.
        RepositoryRefused: There are no credentials, or the endpoint is no address.
    """
    asked, stop = asyncio.Event(), asyncio.Event()
    drain_on_signals(asked, stop)
    async with outside(settings) as opened:
        await ArchiveAgent(opened).run(asked, stop)


def read_ahead(opened: Outside, data_directory: DataDirectory, budget: MemoryBudget) -> ReadAhead:
    """Return what downloads ahead of recovery's asking into the data directory's spool."""
    depth = min(opened.settings.download_concurrency, READ_AHEAD_SEGMENTS)
    return ReadAhead(opened.archive, Spool(data_directory.path), budget, depth)


@asynccontextmanager
async def serve_replay(opened: Outside, budget: MemoryBudget) -> AsyncIterator[Path]:
    """Serve restore_command on a socket of its own inside the context; yield the socket.

    Of its own, because an agent may run on PITR_SOCKET, for another server. Beside it, because nothing else may be
    writable in a container; else in a directory that nobody else may enter.
    """
    settings = opened.settings
    data_directory = DataDirectory(settings.require_data_directory())
    ahead = read_ahead(opened, data_directory, budget)
    fetcher = WalFetcher(opened.archive, ahead, budget, opened.clock, opened.metrics)
    routes = HookApi(None, fetcher, data_directory, settings.request_timeout).routes()
    home = settings.socket.parent
    with contextlib.ExitStack() as stack:
        if not os.access(home, os.W_OK | os.X_OK):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pitr-")))
        path = home / f"pitr-restore-{os.getpid()}.sock"
        reading_ahead = asyncio.create_task(ahead.run(), name=ahead.name)
        try:
            async with serve_socket(path, lambda: allowed_uids(data_directory), routes):
                yield path
        finally:
            reading_ahead.cancel()
            await asyncio.wait([reading_ahead])
            lock_of(path).unlink(missing_ok=True)  # nobody else uses a name with our process id


async def plan_restore(settings: Settings) -> tuple[RestorePlan, RestoreEstimate, list[ConfigError]]:
    """Return how the target that the settings name is reached, how long it takes, and what keeps it from being done.

    Nothing of a base backup is downloaded. Without PGDATA only the repository is asked.

    Raises:
        NoRestorePath: It cannot be reached.
        RepositoryError: The repository could not be read.
    """
    async with outside(settings, retry_seconds=PLAN_RETRY_SECONDS) as opened:
        await opened.store.check()
        await refuse_other_key(opened.store, opened.objects)
        catalog = await read_catalog(opened.store)
        plan = await plan_from_repository(
            opened.store, opened.archive, settings.target, settings.backup_name, catalog=catalog
        )
        estimate = estimate_restore(plan, await read_restore_rates(opened.store, catalog))
        here = settings.data_directory is not None
        return plan, estimate, await preflight(opened.store, settings, plan) if here else []
