"""Progress of long work, as one value that the log, the metrics and the terminal share."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

CHECKPOINT_STAGE = "waiting for a checkpoint"
"""The stage in which a base backup stands still for as long as PostgreSQL takes to write what is in memory."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage of long work has come: `done` of `total` bytes; `total` is 0 while it is unknown."""

    stage: str
    done: int = 0
    total: int = 0

    @property
    def ratio(self) -> float:
        """Share that is done, 0 to 1; 0 while the total is unknown."""
        return min(1.0, self.done / self.total) if self.total else 0.0


ReportProgress = Callable[[Progress], None]
"""Takes each new state; must return at once and not raise."""


class ProgressLog:
    """Logs how far long work has come: percentage, rate and time left, at most one line in `seconds`."""

    def __init__(self, event: str, now: Callable[[], float], *, seconds: float = 10.0) -> None:
        """Log as `event`; `now` returns seconds of a clock that never goes back."""
        self._event = event
        self._now = now
        self._seconds = seconds
        self._begun = Progress("")
        self._begun_at = 0.0
        self._logged_at = 0.0

    def report(self, progress: Progress, where: str | None = None) -> None:
        """Take the next state, and where that is in words; a `ReportProgress`."""
        now = self._now()
        if progress.stage != self._begun.stage:
            self._begun, self._begun_at, self._logged_at = progress, now, now
        elif now - self._logged_at >= self._seconds:
            self._logged_at = now
            rate = (progress.done - self._begun.done) / (now - self._begun_at)
            log.info(
                self._event,
                stage=progress.stage,
                percent=round(100 * progress.ratio, 1),
                **({} if where is None else {"where": where}),
                bytes_per_second=round(rate),
                seconds_left=round((progress.total - progress.done) / rate) if rate and progress.total else None,
            )


class Pace:
    """How fast the current stage of long work goes, over the last `seconds`."""

    def __init__(self, now: Callable[[], float], *, seconds: float = 30.0) -> None:
        """`now` returns seconds of a clock that never goes back."""
        self.progress = Progress("starting")
        self._now = now
        self._seconds = seconds
        self._samples: deque[tuple[float, int]] = deque()
        self._moved_at = now()

    def report(self, progress: Progress) -> None:
        """Take the next state; a `ReportProgress`."""
        now = self._now()
        if progress.stage != self.progress.stage:
            self._samples.clear()
        if progress != self.progress:
            self._moved_at = now
        self.progress = progress
        if not self._samples or now - self._samples[-1][0] >= self._seconds / 30:
            self._samples.append((now, progress.done))
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._seconds:
            self._samples.popleft()

    @property
    def idle_seconds(self) -> float:
        """For how long it has not come any further."""
        return self._now() - self._moved_at

    @property
    def rate(self) -> float | None:
        """Bytes per second; None while there is too little to tell from."""
        if not self._samples or (passed := self._now() - self._samples[0][0]) < self._seconds / 30:
            return None
        return (self.progress.done - self._samples[0][1]) / passed

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the stage is done at this pace; None if that cannot be told."""
        rate, progress = self.rate, self.progress
        return (progress.total - progress.done) / rate if rate and rate > 0 and progress.total else None
