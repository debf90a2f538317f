"""Progress of long work, as one value that the log, the metrics and the terminal share."""

from collections.abc import Callable
from dataclasses import dataclass


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
