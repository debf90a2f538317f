"""What a restore came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from agent.postgres.server_checks import Check
from agent.restore.marker import MarkerStage


@dataclass(frozen=True, slots=True)
class RestoreOutcome:
    """What a restore came to.

    stage: hydrated (ready to be started beside an agent) or promoted (stopped cleanly).
    backup: name of the base backup that was restored.
    timeline, new_timeline: the timeline that was followed, and the one that promotion began.
    target: where recovery stops, or stopped, in words.
    last_commit_at: time of the last transaction replayed; None if there was none, or it is not known any more.
    backup_bytes: size of what was hydrated.
    wal_bytes: how much WAL was replayed, None before that.
    prepared_transactions: how many came back in doubt, None before that: they hold locks until somebody ends them.
    checks: what the promoted server was checked for; all passed.
    note: what the plan has to say about the target, or empty.
    seconds: how long each of `STAGES` took in this run; one that an earlier run completed is absent.
    """

    stage: MarkerStage
    data_directory: Path
    backup: str
    timeline: int
    target: str
    new_timeline: int | None = None
    last_commit_at: datetime | None = None
    backup_bytes: int | None = None
    wal_bytes: int | None = None
    prepared_transactions: int | None = None
    checks: Sequence[Check] = ()
    note: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
