"""Shows which stage a restore is in and how far it has come: in the status, the metrics, the log and the terminal."""

from agent.domain.lsn import format_lsn
from agent.domain.wal import parse_segment_name
from agent.ports import Clock
from agent.postgres.recovery_log import RecoveryLog
from agent.restore.marker import RestoreMarker
from agent.restore.standby import PREPARING
from agent.telemetry.metrics import Metrics
from agent.telemetry.progress import Pace, Progress, ProgressLog, ReportProgress
from agent.telemetry.status import RestoreStatus

STAGES = ("planning", "hydrating", PREPARING, "replaying", "validating")


class RestoreWatch:
    """Is told of each step, and tells everybody else."""

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        """Watch by `clock`; nothing has begun."""
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._metrics = metrics
        self._pace = Pace(clock.monotonic)
        self._log = ProgressLog("restore progressed", clock.monotonic)
        self._told: list[ReportProgress] = []
        self._stage: str | None = None
        self._entered = 0.0
        self._marker: RestoreMarker | None = None
        self._first_lsn = self._target_lsn = self._replayed_lsn = 0

    def also_tell(self, report: ReportProgress) -> None:
        """Tell `report` as well."""
        self._told.append(report)

    def enter(self, stage: str | None) -> None:
        """Leave the present stage, and enter `stage` unless it is None."""
        now = self._clock.monotonic()
        if self._stage is not None:
            self.seconds[self._stage] = round(now - self._entered, 3)
        self._stage, self._entered = stage, now
        for known in STAGES:
            self._metrics.restore_stage.labels(known).set(known == stage)
        self._metrics.restore_progress.set(0)
        if stage is not None:
            self.report(Progress(stage))

    def follows(self, marker: RestoreMarker) -> None:
        """From now on the plan is the one in `marker`."""
        self._marker = marker

    def expects(self, marker: RestoreMarker, segment_bytes: int) -> None:
        """From now on WAL is replayed, from the plan's first segment to its last."""
        self._first_lsn = self._replayed_lsn = parse_segment_name(marker.first_segment, segment_bytes)[1]
        self._target_lsn = parse_segment_name(marker.last_segment, segment_bytes)[1] + segment_bytes
        self._metrics.restore_target_lsn.set(self._target_lsn)

    def replayed(self, said: RecoveryLog) -> None:
        """Take how far replay is."""
        self._replayed_lsn = max(self._replayed_lsn, said.restored_lsn)
        self._metrics.restore_replayed_lsn.set(self._replayed_lsn)
        done, total = self._replayed_lsn - self._first_lsn, self._target_lsn - self._first_lsn
        at = f"at {format_lsn(self._replayed_lsn)} of {format_lsn(self._target_lsn)}"
        self.report(Progress("replaying", done, total), at)

    def report(self, progress: Progress, where: str | None = None) -> None:
        """Take the next state; a `ReportProgress`. `where` is for the log."""
        self._metrics.restore_progress.set(progress.ratio)
        self._pace.report(progress)
        self._log.report(progress, where)
        for report in self._told:
            report(progress)

    def status(self) -> RestoreStatus:
        """Say how it is, now."""
        progress, marker, is_replaying = self._pace.progress, self._marker, self._target_lsn > 0
        return RestoreStatus(
            stage=self._stage,
            target=None if marker is None else marker.target,
            backup=None if marker is None else marker.backup,
            timeline=None if marker is None else marker.timeline,
            note=None if marker is None else marker.note or None,
            done_bytes=progress.done,
            total_bytes=progress.total,
            ratio=round(progress.ratio, 4),
            bytes_per_second=self._pace.rate,
            seconds_left=self._pace.seconds_left,
            replayed_lsn=format_lsn(self._replayed_lsn) if is_replaying else None,
            target_lsn=format_lsn(self._target_lsn) if is_replaying else None,
            seconds=dict(self.seconds),
        )
