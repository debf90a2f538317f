"""Which base backup a delta builds on, or why a full one is to be taken.

Source: delta_backup_configurator.go in WAL-G, for the settings' meaning; the rest is what keeps a chain restorable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.domain.catalog import Backup, ancestors
from agent.domain.lsn import format_lsn
from agent.domain.timeline import Stretch


class BackupKind(StrEnum):
    """What base backup is asked for; `auto`: what the settings say."""

    AUTO = "auto"
    FULL = "full"
    DELTA = "delta"


@dataclass(frozen=True, slots=True)
class DeltaPolicy:
    """When deltas are taken, as WAL-G's settings say.

    max_steps: `WALG_DELTA_MAX_STEPS`: most deltas between two full backups; 0: no deltas.
    from_full: `WALG_DELTA_ORIGIN=LATEST_FULL`: each delta builds on the full backup, not on the delta before it.
    from_name: `WALG_DELTA_FROM_NAME`: build on this base backup; None: on the newest.
    """

    max_steps: int = 0
    from_full: bool = False
    from_name: str | None = None


@dataclass(frozen=True, slots=True)
class NewBackup:
    """The base backup that is being started.

    start_lsn: its start LSN. path: the way to the server's timeline.
    """

    start_lsn: int
    path: tuple[Stretch, ...]
    system_identifier: int
    pg_version: int
    permanent: bool


@dataclass(frozen=True, slots=True)
class DeltaParent:
    """What a delta builds on.

    chain: names of `backup` and of those that it builds on itself, the full one last.
    count: what the new one has as its count of deltas since the full one.
    """

    backup: Backup
    chain: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class NoParent:
    """A full base backup is to be taken. `reason` says why, lower case, without a full stop."""

    reason: str


def choose_parent(
    kind: BackupKind, backups: Sequence[Backup], policy: DeltaPolicy, new: NewBackup
) -> DeltaParent | NoParent:
    """Choose the parent of `new` among `backups` (oldest first).

    A delta that is asked for by name is not bound by `policy.max_steps`.
    """
    if kind is BackupKind.FULL:
        return NoParent("a full one was asked for")
    if kind is BackupKind.AUTO and policy.max_steps == 0:
        return NoParent("WALG_DELTA_MAX_STEPS is 0")
    latest = _latest(backups, policy, new)
    if isinstance(latest, NoParent):
        return latest
    count = latest.delta_count + 1
    if kind is BackupKind.AUTO and count > policy.max_steps:
        return NoParent(f"{latest.name} is delta {latest.delta_count} of at most {policy.max_steps}")
    chain = _chain(latest, {backup.name: backup for backup in backups})
    if isinstance(chain, NoParent):
        return chain
    if policy.from_full:
        chain = chain[-1:]
    parent = chain[0]
    if parent.permanent and not (new.permanent or policy.from_full):
        return NoParent(f"{parent.name} is permanent, and a base backup that is not must not depend on it")
    return DeltaParent(parent, tuple(backup.name for backup in chain), count)


def _latest(backups: Sequence[Backup], policy: DeltaPolicy, new: NewBackup) -> Backup | NoParent:
    if policy.from_name is not None:
        backups = [backup for backup in backups if backup.name == policy.from_name]
        if not backups:
            return NoParent(f"WALG_DELTA_FROM_NAME={policy.from_name} is not in the repository")
    if not backups:
        return NoParent("the repository holds no base backup")
    problem = ""
    for backup in reversed(backups):
        problem = problem_with(backup, new) or ""
        if not problem:
            return backup
    return NoParent(f"no base backup can be its parent; {problem}")


def problem_with(parent: Backup, new: NewBackup) -> str | None:
    """Say why `new` cannot build on `parent`, or return None if it can."""
    if parent.system_identifier != new.system_identifier:
        return f"{parent.name} is of database cluster {parent.system_identifier}, not {new.system_identifier}"
    if parent.pg_version // 10000 != new.pg_version // 10000:
        return f"{parent.name} is of PostgreSQL {parent.pg_version // 10000}"
    stretch = next((stretch for stretch in new.path if stretch.timeline == parent.timeline), None)
    if stretch is None:
        return f"{parent.name} is of timeline {parent.timeline}, which {new.path[-1].timeline} does not come from"
    # What the parent holds of pages changed after the switch is of another history.
    if stretch.to_lsn is not None and parent.finish_lsn > stretch.to_lsn:
        return f"{parent.name} ends after timeline {parent.timeline} was left at {format_lsn(stretch.to_lsn)}"
    if parent.finish_lsn > new.start_lsn:
        return f"{parent.name} ends at {format_lsn(parent.finish_lsn)}, after the start of the new one"
    return None


def _chain(backup: Backup, by_name: Mapping[str, Backup]) -> list[Backup] | NoParent:
    """Return `backup` and those that it builds on, the full one last."""
    chain = [backup, *ancestors(backup, by_name)]
    if chain[-1].parent is not None:
        return NoParent(f"{chain[-1].name} builds on {chain[-1].parent}, which is gone")
    return chain
