"""The second half of a restore: PostgreSQL replays and promotes in a hydrated directory, and what came of it is judged.

Invariants:
    Once a server of ours has begun to replay, no other can start before recovery has ended.
    What was promoted half-way, or replayed short of the plan or beyond the time asked for, is never called restored,
    and its pg_control is set aside: no server can be started there by accident.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from agent.domain.control_file import ClusterState, ControlFile
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import RestoreTarget, format_time
from agent.domain.timeline import Ancestor
from agent.domain.wal import parse_segment_name
from agent.errors import ConfigError, RestoreFailed
from agent.ports import Clock, ObjectStore
from agent.postgres.data_directory import DataDirectory
from agent.postgres.durable import fsync_directory, remove_durably
from agent.postgres.postmaster import Postmaster, Recovery, find_postgres
from agent.repository.restore_lease import restore_lease
from agent.restore.existing import require_no_server
from agent.restore.marker import MarkerStage, RestoreMarker, mark
from agent.restore.recovery_settings import RECOVERY_SIGNAL, remove_recovery_settings, reserve_recovery
from agent.restore.unpacker import UNFINISHED_CONTROL_FILE
from agent.restore.validation import require_passed, validate
from agent.restore.wanted import CONTROL_FILE
from agent.restore.watch import RestoreWatch
from agent.settings import Settings
from agent.tasks import in_thread

log = structlog.get_logger()

_AGAIN_FROM_EMPTY = "Empty the directory and run the restore again."


class Promotion:
    """Leads PostgreSQL in PGDATA through replay and promotion, and checks what it became."""

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        *,
        clock: Clock,
        watch: RestoreWatch,
        hook_environment: Mapping[str, str],
    ) -> None:
        """Make it; nothing is done yet. The arguments are those of `Restorer`; `watch` is told the progress."""
        self._settings = settings
        self._store = store
        self._clock = clock
        self._watch = watch
        self._hook_environment = hook_environment
        self._path = settings.require_data_directory()
        self._data_directory = DataDirectory(self._path)

    async def run(self, marker: RestoreMarker) -> RestoreMarker:
        """Run PostgreSQL through replay and promotion, as far as that is still to be done; return the last marker."""
        self._watch.enter("replaying")
        if marker.stage is MarkerStage.HYDRATED:  # of a later stage it is a killed server of ours that left a file
            await in_thread(require_no_server, self._path)
        control = await in_thread(self._data_directory.control_file)
        is_recovering = await in_thread((self._path / RECOVERY_SIGNAL).exists)
        if not is_recovering:
            if (failure := _half_promoted(marker, control)) is not None:
                raise await give_up(self._path, marker, failure)
            if marker.stage is MarkerStage.HYDRATED:
                if control.state is not ClusterState.SHUT_DOWN:
                    raise ConfigError(
                        f"another server promoted {self._path}, and was not stopped cleanly",
                        hint="Use it as it is; or start it and stop it, and run the restore again.",
                    )
                log.info("promotion by another server found", pgdata=str(self._path), new_timeline=control.timeline)
                return await in_thread(
                    mark, self._path, replace(marker, new_timeline=control.timeline), MarkerStage.PROMOTED
                )
        marker = await in_thread(mark, self._path, marker, MarkerStage.REPLAYING)
        self._watch.expects(marker, control.wal_segment_bytes)
        await in_thread(reserve_recovery, self._path)
        if is_recovering or control.state is not ClusterState.SHUT_DOWN:
            async with restore_lease(self._store, marker.backup, self._clock):
                recovery = await self._recover_wholly(marker, control)
            if is_recovering and (
                failure := failure_of(marker, recovery, control.wal_segment_bytes, self._settings.target)
            ):
                raise await give_up(self._path, marker, failure)
            marker = replace(
                marker,
                new_timeline=recovery.new_timeline,
                last_commit_at=marker.stop_commit_at or recovery.last_commit_at,
                prepared_transactions=recovery.prepared_transactions,
                wal_bytes=max(0, recovery.restored_lsn - _start_of(marker.first_segment, control.wal_segment_bytes)),
            )
        if not is_recovering:  # promoted by a run that was killed before it judged
            ancestors = await in_thread(self._data_directory.timeline_history, control.timeline)
            if (failure := _fell_short(marker, ancestors, control.wal_segment_bytes)) is not None:
                raise await give_up(self._path, marker, failure)
        # The command line of our server, left by a run that was killed: `pg_ctl restart` would repeat it.
        await in_thread(remove_durably, self._path / "postmaster.opts")
        await in_thread(remove_recovery_settings, self._path)
        marker = replace(marker, new_timeline=marker.new_timeline or control.timeline, finished_at=self._clock.now())
        return await in_thread(mark, self._path, marker, MarkerStage.PROMOTED)

    async def _recover_wholly(self, marker: RestoreMarker, control: ControlFile) -> Recovery:
        """Recover; if that fails half-way through promotion, see to it that nobody starts what is left."""
        try:
            return await self._recover(control)
        except RestoreFailed as error:
            if not await in_thread((self._path / RECOVERY_SIGNAL).exists):
                control = await in_thread(self._data_directory.control_file)
                if (failure := _half_promoted(marker, control)) is not None:
                    raise await give_up(self._path, marker, f"{error.message}; {failure}") from error
            raise

    async def _program(self, control: ControlFile) -> Path:
        if control.major_version is None:
            raise ConfigError(f"{self._path} is of an unknown PostgreSQL version", hint="Use a newer agent.")
        return await find_postgres(control.major_version, self._settings.postgres_bin)

    async def _recover(self, control: ControlFile) -> Recovery:
        program = await self._program(control)
        recovery = await Postmaster(program, self._path, self._hook_environment).recover(self._watch.replayed)
        log.info(
            "server promoted",
            new_timeline=recovery.new_timeline,
            stopped=recovery.stopped,
            last_commit_at=recovery.last_commit_at,
            redo_done_lsn=None if recovery.redo_done_lsn is None else format_lsn(recovery.redo_done_lsn),
        )
        if recovery.prepared_transactions:
            log.warning(
                "prepared transactions came back", count=recovery.prepared_transactions, see="pg_prepared_xacts"
            )
        return recovery

    async def validated(self, marker: RestoreMarker) -> RestoreMarker:
        """Check the promoted server; record what came of it, so that a restarted Job does not pass over a failure."""
        self._watch.enter("validating")
        program = await self._program(await in_thread(self._data_directory.control_file))
        checks = await validate(self._settings, program, self._path)
        marker = await in_thread(mark, self._path, replace(marker, checks=tuple(checks)), marker.stage)
        require_passed(checks, self._path)
        return marker


async def give_up(data_directory: Path, marker: RestoreMarker, failure: str) -> RestoreFailed:
    """Record that nothing goes on from here, and take pg_control away; return the error to raise."""
    await in_thread(mark, data_directory, replace(marker, failure=failure), MarkerStage.FAILED)
    await in_thread(_set_control_file_aside, data_directory)
    return RestoreFailed(failure, hint=_AGAIN_FROM_EMPTY)


def _start_of(segment: str, segment_bytes: int) -> int:
    return parse_segment_name(segment, segment_bytes)[1]


def _half_promoted(marker: RestoreMarker, control: ControlFile) -> str | None:
    """Say so if a directory without its signal file has not been promoted, else return None.

    Between removing the signal file and the end-of-recovery checkpoint a promotion is half done. Started then, the
    server would replay what lies in pg_wal, beyond the target, with nothing to stop it.
    Source: StartupXLOG() in PostgreSQL's xlog.c.
    """
    if control.timeline > marker.timeline:
        return None
    return (
        f"{RECOVERY_SIGNAL} is gone, but the control file is still on timeline {control.timeline}: "
        "the promotion was cut short, and starting the server would replay beyond the target"
    )


def _set_control_file_aside(data_directory: Path) -> None:
    control_file = data_directory / CONTROL_FILE
    if control_file.exists():  # a run that was killed here may have done it
        control_file.rename(data_directory / UNFINISHED_CONTROL_FILE)
        fsync_directory(control_file.parent)


def failure_of(marker: RestoreMarker, recovery: Recovery, segment_bytes: int, target: RestoreTarget) -> str | None:
    """Say in what a promoted server falls short of the plan, or goes beyond the time that was asked for, or None.

    Without a target PostgreSQL takes damaged or missing WAL for its end, and opens without a word.
    """
    if recovery.new_timeline <= marker.timeline:
        return f"the server opened on timeline {recovery.new_timeline} instead of beginning one"
    if marker.to_the_end and recovery.restored_lsn < _start_of(marker.last_segment, segment_bytes) + segment_bytes:
        return _ended_early(marker, recovery.redo_done_lsn or 0)
    if target.time is not None and recovery.last_commit_at is not None and recovery.last_commit_at > target.time:
        return f"a transaction of {format_time(recovery.last_commit_at)} was replayed, which is after the {target}"
    return None


def _fell_short(marker: RestoreMarker, ancestors: Sequence[Ancestor], segment_bytes: int) -> str | None:
    """Say so if a server whose log is lost was promoted before it came to the plan's last segment, or return None."""
    left_at = next((each.switch_lsn for each in ancestors if each.timeline >= marker.timeline), None)
    if not marker.to_the_end or left_at is None or left_at > _start_of(marker.last_segment, segment_bytes):
        return None
    return _ended_early(marker, left_at)


def _ended_early(marker: RestoreMarker, lsn: int) -> str:
    return (
        f"replay ended at {format_lsn(lsn)}, though WAL is archived up to {marker.last_segment}: a segment before that "
        "is damaged, or was not delivered"
    )
