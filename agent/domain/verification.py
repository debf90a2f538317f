"""What a repository lacks, from listings alone: WAL that a base backup needs, and objects of base backups."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from agent.domain.catalog import Backup
from agent.domain.inventory import Inventory, TimelineMap
from agent.domain.wal_runs import lacking, merged, name_on_path


@dataclass(frozen=True, slots=True)
class MissingWal:
    """Consecutive segments that are not archived, on the way to `timeline`: the first, the last, how many."""

    timeline: int
    first: str
    last: str
    segments: int

    def __str__(self) -> str:
        return f"{self.segments} WAL segments from {self.first} on are missing"


def missing_wal(inventory: Inventory) -> list[MissingWal]:
    """Return what is missing of the WAL after the base backups, up to the last segment on each way that they lead to.

    Of a pinned base backup only the WAL that makes it consistent counts: expiry removes what comes after. The same
    segments are told once, for the lowest timeline that leads through them.
    """
    world = TimelineMap(inventory)
    found: dict[str, MissingWal] = {}
    # A timeline that has only begun needs no segment of its own yet.
    begun = {timeline for timeline, wal in inventory.wal.items() if wal.held}
    for timeline in sorted(begun | {backup.timeline for backup in inventory.backups}):
        held = world.held_on_path(timeline)
        leading = [backup for backup in inventory.backups if world.leads_to(backup, timeline)]
        wanted = [world.numbers(backup) for backup in leading]
        starts = [world.numbers(backup).start for backup in leading if not backup.permanent]
        if starts and held:
            wanted.append(range(min(starts), held[-1].stop))
        for numbers in (missing for each in merged(wanted) for missing in lacking(each, held)):
            names = [
                name_on_path(world.path(timeline), number, inventory.segment_bytes)
                for number in (numbers.start, numbers.stop - 1)
            ]
            found.setdefault(names[0], MissingWal(timeline, names[0], names[1], len(numbers)))
    return [found[name] for name in sorted(found)]


def wal_problem(inventory: Inventory, backup: Backup) -> str | None:
    """Say why `backup` cannot be made consistent on any way, as far as parents and WAL go; None if it can."""
    world = TimelineMap(inventory)
    return None if world.intact(backup) else world.problem(backup, backup.timeline)


def object_problems(backup: Backup, tars: Mapping[str, int], sets: Collection[str]) -> list[str]:
    """Return what is wrong with the objects of `backup`.

    Args:
        backup: Its entry in the catalog.
        tars: Sizes by name of what is in its tar folder.
        sets: Names of the tars that its `files_metadata.json` lists; some repositories list none, none lists
            `pg_control`.

    Source: WAL-G's CompressedSize may be some bytes short of what it stored, and is never more.
    """
    problems = [f"{name} is missing" for name in sorted(set(sets) - set(tars))]
    problems += [f"{name} is empty" for name in sorted(tars) if tars[name] == 0]
    if not any(name.startswith("pg_control.tar") for name in tars):
        problems.append("pg_control.tar is missing")
    stored = sum(tars.values())
    if stored < backup.stored_bytes:
        problems.append(f"its tars have {stored} bytes, {backup.stored_bytes} were stored")
    return problems
