"""What a restore needs: which base backup, which WAL, and where replay stops."""

from dataclasses import dataclass

from agent.domain.catalog import Backup
from agent.domain.restore_target import RestoreTarget


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How one target is reached.

    backup: the base backup that recovery begins from.
    chain: the base backups to hydrate, the full one first, `backup` last.
    target: what was asked for.
    effective_target: what PostgreSQL is to be told. Its timeline is always a decimal number. It differs from `target`
        where PostgreSQL would refuse the target although nothing is missing; `note` then says so.
    timeline: the timeline that replay follows: recovery_target_timeline.
    segment_bytes: `wal_segment_size` of the archived WAL.
    segments: names of the WAL segments that replay reads, in order; none is missing.
    stop_lsn: start of the record that replay stops at or before, None if it runs to the end of the WAL or stops as soon
        as it is consistent.
    download_bytes: what is downloaded, base backups and WAL, as stored.
    restored_bytes: what the base backups write, before compression.
    note: a sentence for the operator, or empty.
    """

    backup: Backup
    chain: tuple[Backup, ...]
    target: RestoreTarget
    effective_target: RestoreTarget
    timeline: int
    segment_bytes: int
    segments: tuple[str, ...]
    stop_lsn: int | None = None
    download_bytes: int = 0
    restored_bytes: int = 0
    note: str = ""

    @property
    def first_segment(self) -> str:
        """Name of the first WAL segment that replay reads."""
        return self.segments[0]

    @property
    def last_segment(self) -> str:
        """Name of the last WAL segment that replay reads."""
        return self.segments[-1]
