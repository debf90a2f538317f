"""Carries a restore through, from the request to a directory that a server can be started in, or was promoted in.

    claim -> plan -> check -> hydrate -> recovery settings -> pg_control
          -> [replay, promote, stop -> clean up -> validate]

A process may be killed after any step; the marker (`agent.restore.marker`) says where the next one goes on.
Invariants:
    Nothing is downloaded before the plan says that the target can be reached, and the check that it can be used here.
    A directory in which PostgreSQL can start has its recovery settings, its signal file and its label.
    What is promised of replay and promotion is in `agent.restore.promotion`.
"""

import errno
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import google_crc32c
import structlog

from agent.budget import MemoryBudget
from agent.domain.control_file import parse_control_file, without_checkpoint
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_rates import rates_of
from agent.domain.restore_target import TargetKind
from agent.errors import ConfigError, PreflightFailed, RestoreFailed
from agent.ports import Clock, ObjectStore
from agent.postgres.durable import locked_directory, replace_durably
from agent.postgres.postmaster import refuse_root
from agent.repository.object_format import ObjectFormat
from agent.repository.restore_lease import restore_lease
from agent.repository.restore_record import write_restore_rates
from agent.repository.wal_archive import WalArchive
from agent.restore.collations import local_libc, other_libc
from agent.restore.existing import holds_data, take_over
from agent.restore.hydrate import claim, finish, hydrate, is_writable
from agent.restore.marker import (
    MarkerStage,
    RestoreMarker,
    mark,
    read_marker,
    require_same_request,
    restore_request,
)
from agent.restore.new_tablespaces import require_no_harm
from agent.restore.outcome import RestoreOutcome
from agent.restore.planner import plan_from_repository
from agent.restore.preflight import require_possible
from agent.restore.promotion import Promotion, give_up
from agent.restore.recovery_settings import (
    recovery_settings,
    restore_command,
    write_recovery_settings,
)
from agent.restore.standby import PREPARING, raised_limits, standby_problems, write_standby_settings
from agent.restore.unpacker import UNFINISHED_CONTROL_FILE
from agent.restore.watch import RestoreWatch
from agent.settings import RestoreAs, Settings
from agent.tasks import in_thread
from agent.telemetry.metrics import Metrics
from agent.telemetry.progress import ReportProgress
from agent.telemetry.status import RestoreStatus

log = structlog.get_logger()


class Restorer:
    """Restores what the settings ask for into PGDATA."""

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        objects: ObjectFormat,
        archive: WalArchive,
        *,
        clock: Clock,
        metrics: Metrics,
        budget: MemoryBudget,
        hook_environment: Mapping[str, str],
    ) -> None:
        """Make it; nothing is done yet.

        Args:
            settings: What to restore, where to, and how far.
            store: The repository.
            objects: How its objects are packed.
            archive: Its WAL part.
            clock: Where time comes from.
            metrics: Where stage and progress show.
            budget: What buffers are reserved from.
            hook_environment: What the hook needs when PostgreSQL runs it: `PITR_SOCKET`, served by an agent in this
                process from before `run` until it returns.

        Raises:
            ConfigError: PGDATA is not set.
        """
        self._settings = settings
        self._store = store
        self._objects = objects
        self._archive = archive
        self._clock = clock
        self._budget = budget
        self._path = settings.require_data_directory()
        self._request = restore_request(settings)
        self._watch = RestoreWatch(clock, metrics)
        self._promotion = Promotion(settings, store, clock=clock, watch=self._watch, hook_environment=hook_environment)
        self._stored_bytes = 0  # downloaded by this run, if it hydrated all by itself

    def status(self) -> RestoreStatus:
        """Say how far the restore is."""
        return self._watch.status()

    async def run(self, report: ReportProgress) -> RestoreOutcome:
        """Restore, going on where an earlier run of the same request stopped; return when it is done.

        Raises:
            ConfigError: PGDATA, another setting, or this machine cannot be used for it.
            NoRestorePath: The target cannot be reached.
            RepositoryError: The repository cannot be read.
            RestoreFailed: It was given up.
            ValidationFailed: It is restored, and does not pass the checks that were asked for.
        """
        refuse_root()
        self._watch.also_tell(report)
        try:
            if not await in_thread(is_writable, self._path):
                await claim(self._path)  # makes it, or says why it cannot be used
            with locked_directory(self._path):
                return await self._run()
        except BlockingIOError:
            raise ConfigError(
                f"another restore is at work in {self._path}", hint="Wait until it has ended, or restore elsewhere."
            ) from None
        except OSError as error:
            raise RestoreFailed(
                f"{error.filename or self._path}: {error.strerror}",
                hint=f"{_volume_hint(error)}, then run the restore again: it goes on where it stopped.",
            ) from error
        finally:
            self._watch.enter(None)

    async def _run(self) -> RestoreOutcome:
        marker = await self._hydrated()
        self._watch.follows(marker)
        if self._settings.auto_start and marker.stage is not MarkerStage.PROMOTED:
            marker = await self._promotion.run(marker)
        if self._settings.auto_start and self._settings.validation and not _is_valid(marker):
            marker = await self._promotion.validated(marker)
        self._watch.enter(None)
        await self._keep_rates(marker)
        outcome = RestoreOutcome(
            stage=marker.stage,
            data_directory=self._path,
            backup=marker.backup,
            timeline=marker.timeline,
            target=marker.target,
            new_timeline=marker.new_timeline,
            last_commit_at=marker.last_commit_at,
            backup_bytes=marker.backup_bytes,
            wal_bytes=marker.wal_bytes,
            prepared_transactions=marker.prepared_transactions,
            checks=marker.checks or (),
            note=marker.note,
            seconds=self._watch.seconds,
        )
        log.info(
            "restore finished",
            stage=outcome.stage,
            pgdata=str(self._path),
            backup_id=outcome.backup,
            target=outcome.target,
            timeline=outcome.timeline,
            new_timeline=outcome.new_timeline,
            last_commit_at=outcome.last_commit_at,
            backup_bytes=outcome.backup_bytes,
            wal_bytes=outcome.wal_bytes,
            prepared_transactions=outcome.prepared_transactions,
            checks=len(outcome.checks),
            note=outcome.note,
            seconds=outcome.seconds,
        )
        return outcome

    async def _keep_rates(self, marker: RestoreMarker) -> None:
        """Leave in the repository how fast it went, for the plans to come; nothing of a run that was helped."""
        if self._stored_bytes:
            seconds = self._watch.seconds
            hydrated = (self._stored_bytes, seconds.get("hydrating"))
            rates = rates_of(self._clock.now(), hydrated, (marker.wal_bytes or 0, seconds.get("replaying")))
            await write_restore_rates(self._store, marker.backup, rates)

    async def _hydrated(self) -> RestoreMarker:
        """Return the marker of a directory that is hydrated, or beyond; hydrate it if it is not."""
        marker = await in_thread(read_marker, self._path)
        over = self._settings.restore_delta
        if marker is None:
            if not (over and await in_thread(holds_data, self._path)):
                await claim(self._path)
            return await self._hydrate(None)
        if over and marker.request != self._request:
            return await self._hydrate(None)
        require_same_request(marker, self._request, self._path)
        log.info("begun restore found", pgdata=str(self._path), stage=marker.stage, backup_id=marker.backup)
        if marker.stage is MarkerStage.FAILED:
            raise await give_up(self._path, marker, str(marker.failure))
        if marker.stage is not MarkerStage.HYDRATING:
            return marker
        if await in_thread((self._path / "global" / "pg_control").exists):
            await finish(self._path)  # pg_control is there: at most the tidying up is left
            return await in_thread(mark, self._path, marker, MarkerStage.HYDRATED)
        return await self._hydrate(marker)

    async def _hydrate(self, begun: RestoreMarker | None) -> RestoreMarker:
        plan = await self._plan(begun)
        await require_possible(self._store, self._settings, plan)
        await require_no_harm(self._store, self._archive, self._settings, plan)
        self._watch.enter("hydrating")
        if (warning := other_libc(plan.backup.libc, local_libc())) is not None:
            log.warning("text may be sorted otherwise here", backup_id=plan.backup.name, reason=warning)
            plan = replace(plan, note="; ".join(filter(None, [plan.note, warning])))
        marker = _marker_of(plan, self._request, begun, self._clock.now())
        if self._settings.restore_delta and await in_thread(holds_data, self._path):
            log.warning("existing data directory is restored over", pgdata=str(self._path))
            await in_thread(take_over, self._path, plan.backup.system_identifier)
        await in_thread(mark, self._path, marker, MarkerStage.HYDRATING)
        self._watch.follows(marker)
        async with restore_lease(self._store, plan.backup.name, self._clock):
            await hydrate(
                self._store,
                self._objects,
                plan,
                self._path,
                tablespace_map=self._settings.tablespace_map,
                concurrency=self._settings.download_concurrency,
                report=self._watch.report,
                budget=self._budget,
                keep_matching=self._settings.restore_delta,
            )
        if begun is None and not self._settings.restore_delta:
            self._stored_bytes = sum(backup.stored_bytes for backup in plan.chain)
        await self._write_settings(plan)
        await in_thread(_insist_on_label, self._path / UNFINISHED_CONTROL_FILE)
        await finish(self._path)
        marker = await in_thread(mark, self._path, marker, MarkerStage.HYDRATED)
        # The name that runbooks look for, as they do for `wal_fetch`.
        log.info("backup_fetch", pgdata=str(self._path), backup_id=marker.backup, restored_bytes=plan.restored_bytes)
        return marker

    async def _write_settings(self, plan: RestorePlan) -> None:
        command = restore_command(self._settings.hook_directory)
        if self._settings.restore_as is RestoreAs.STANDBY:
            self._watch.enter(PREPARING)
            content = await in_thread((self._path / UNFINISHED_CONTROL_FILE).read_bytes)
            control = parse_control_file(content, google_crc32c.value)
            limits = await raised_limits(self._archive, plan, control, self._watch.report)
            if limits:
                log.info("limits raised to the primary's", **limits)
            await in_thread(write_standby_settings, self._path, command, self._settings.primary_conninfo, limits)
            return
        knows_prefetch = plan.backup.pg_version >= 150000
        settings = recovery_settings(
            plan.effective_target, command, read_ahead=not (plan.ends_at_gap and knows_prefetch)
        )
        write = partial(write_recovery_settings, keep_archiving=self._settings.archive_after_restore)
        await in_thread(write, self._path, settings)

    async def _plan(self, begun: RestoreMarker | None) -> RestorePlan:
        self._watch.enter("planning")
        if problems := standby_problems(self._settings):
            raise PreflightFailed(problems)
        target, backup_name = self._settings.target, self._settings.backup_name
        if begun is not None:  # the repository may have grown since: what was begun is what is restored
            target, backup_name = replace(target, timeline=str(begun.timeline)), begun.backup
        return await plan_from_repository(self._store, self._archive, target, backup_name)


def _marker_of(
    plan: RestorePlan, request: Mapping[str, str], begun: RestoreMarker | None, now: datetime
) -> RestoreMarker:
    return RestoreMarker(
        request=request,
        stage=MarkerStage.HYDRATING,
        backup=plan.backup.name,
        timeline=plan.timeline,
        target="its primary, as a standby" if "restore_as" in request else str(plan.effective_target),
        first_segment=plan.first_segment,
        last_segment=plan.last_segment,
        to_the_end=plan.effective_target.kind is TargetKind.END_OF_WAL,
        started_at=now if begun is None else begun.started_at,
        stop_commit_at=plan.stop_commit_at,
        note=plan.note,
        backup_bytes=plan.restored_bytes,
        system_identifier=plan.backup.system_identifier,
    )


def _volume_hint(error: OSError) -> str:
    """Say what to do about the volume that answered with `error`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Enlarge the volume, or free space on it"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Mount the volume writable for the user that PostgreSQL runs as, and run as that user"
    return "Look at the volume"


def _insist_on_label(control_file: Path) -> None:
    replace_durably(control_file, without_checkpoint(control_file.read_bytes(), google_crc32c.value))


def _is_valid(marker: RestoreMarker) -> bool:
    return marker.checks is not None and all(check.passed for check in marker.checks)
