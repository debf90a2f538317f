"""Progress of long work, as one value that the log, the metrics and the terminal share."""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

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

    def report(self, progress: Progress) -> None:
        """Take the next state; a `ReportProgress`."""
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
                bytes_per_second=round(rate),
                seconds_left=round((progress.total - progress.done) / rate) if rate and progress.total else None,
            )
