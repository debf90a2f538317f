"""The way to a timeline's end with what the repository holds on it, and which base backups serve there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.domain.catalog import Backup, ancestors
from agent.domain.lsn import format_lsn
from agent.domain.timeline import Ancestor, path_to
from agent.domain.wal_runs import WalRun, wal_runs


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the repository holds.

    backups: the catalog.
    histories: the archived timeline histories.
    wal: for each timeline the numbers (start LSN by segment size) of its archived WAL segments, see `wal_runs`.
    segment_bytes: `wal_segment_size`.
    """

    backups: Sequence[Backup]
    histories: Mapping[int, Sequence[Ancestor]]
    wal: Mapping[int, Sequence[range]]
    segment_bytes: int


class UnfitKind(StrEnum):
    """Why a base backup does not serve a target, in the order in which it explains a refusal."""

    BROKEN = "WAL or a parent that it needs is missing"
    NOT_SHOWN = "the WAL after it does not show the target"
    TOO_EARLY = "the target is before its end"
    OFF_PATH = "it is of another branch"


class Unfit(Exception):
    """A base backup does not serve, for the reason given.

    `names_gap`: the reason names WAL that is missing, in which the target may be.
    """

    def __init__(self, reason: str, kind: UnfitKind = UnfitKind.BROKEN, *, names_gap: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.names_gap = names_gap


class ArchivedPath:
    """The way to the end of one timeline: `stretches` of timelines, and `runs` of archived WAL without a gap."""

    def __init__(self, held: Holdings, timeline: int) -> None:
        self.timeline = timeline
        self.stretches = path_to(timeline, held.histories.get(timeline, ()))
        self.runs = wal_runs(self.stretches, held.wal, held.segment_bytes)
        self._by_name = {backup.name: backup for backup in held.backups}

    def require_on_path(self, backup: Backup) -> None:
        """Return if `backup` is on the way to the timeline, else raise `Unfit`."""
        stretch = next((s for s in self.stretches if s.timeline == backup.timeline), None)
        if stretch is None:
            raise Unfit(
                f"it is on timeline {backup.timeline}, which timeline {self.timeline} does not come from",
                UnfitKind.OFF_PATH,
            )
        if stretch.to_lsn is not None and stretch.to_lsn < backup.finish_lsn:
            raise Unfit(
                f"it ended at {format_lsn(backup.finish_lsn)}, but the way to timeline {self.timeline} left timeline "
                f"{backup.timeline} before, at {format_lsn(stretch.to_lsn)}",
                UnfitKind.OFF_PATH,
            )

    def chain(self, backup: Backup) -> tuple[Backup, ...]:
        """Return what `backup` builds on, the full one first, and itself; raise `Unfit` if one is missing."""
        chain = [backup, *ancestors(backup, self._by_name)]
        if (parent := chain[-1].parent) is not None:
            raise Unfit(f"base backup {parent}, which it builds on, is missing")
        return tuple(reversed(chain))

    def run_of(self, backup: Backup) -> WalRun:
        """Return the unbroken WAL that `backup` begins in; it holds at least what makes the backup consistent.

        Raises:
            Unfit: There is no such WAL.
        """
        for run in self.runs:
            if run.start_lsn <= backup.start_lsn < run.end_lsn:
                if not run.holds(backup.start_lsn, backup.finish_lsn):
                    raise Unfit(f"{run.hole or 'WAL'} before its end at {format_lsn(backup.finish_lsn)}")
                return run
        raise Unfit(f"the WAL segment {backup.start_segment} that it begins in is missing")

    def serves(self, backup: Backup) -> bool:
        """Tell whether a restore can begin from `backup` and follow this path."""
        try:
            self.require_on_path(backup)
            self.chain(backup)
            self.run_of(backup)
        except Unfit:
            return False
        return True
