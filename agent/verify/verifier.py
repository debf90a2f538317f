"""Tells whether a repository holds what its base backups need: every tar, of the recorded size, and unbroken WAL.

From listings and the backups' JSON objects: nothing of the content is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.domain.catalog import Backup
from agent.domain.verification import MissingWal, missing_wal, object_problems, wal_problem
from agent.errors import RepositoryCorrupt
from agent.ports import Clock, ObjectStore
from agent.repository.backups import list_tars, read_files_metadata, read_sentinel
from agent.repository.survey import survey_repository
from agent.repository.wal_archive import WalArchive


@dataclass(frozen=True, slots=True)
class VerifiedBackup:
    """A base backup, and what is wrong with it: nothing, if it is whole."""

    backup: Backup
    problems: Sequence[str]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found."""

    backups: Sequence[VerifiedBackup]
    gaps: Sequence[MissingWal]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.gaps and not any(each.problems for each in self.backups)

    def raise_if_broken(self) -> None:
        """Raise `RepositoryCorrupt`, which tells of the first problem, unless nothing is wrong."""
        broken = [f"{each.backup.name}: {each.problems[0]}" for each in self.backups if each.problems]
        gaps = [f"{gap.segments} WAL segments from {gap.first} on are missing" for gap in self.gaps]
        found = [*broken, *gaps]
        if found:
            more = f", and {len(found) - 1} more problems" if len(found) > 1 else ""
            raise RepositoryCorrupt(
                f"{found[0]}{more}", hint="Take a base backup now: pitr backup now --full. What is lost, stays lost."
            )


async def verify_repository(store: ObjectStore, archive: WalArchive, clock: Clock) -> Verification:
    """Look at every base backup's objects, and at the WAL.

    Raises:
        RepositoryCorrupt: A sentinel or a history file cannot be understood.
        RepositoryError: The repository could not be read.
    """
    inventory = (await survey_repository(store, archive, clock)).inventory
    verified: dict[str, VerifiedBackup] = {}
    for backup in sorted(inventory.backups, key=lambda each: each.delta_count):
        problems = await _problems(store, backup)
        if (lacking := wal_problem(inventory, backup)) is not None:
            problems.append(lacking)
        if backup.parent in verified and verified[backup.parent].problems:
            problems.append(f"it builds on {backup.parent}, which is broken")
        verified[backup.name] = VerifiedBackup(backup, problems)
    return Verification([verified[backup.name] for backup in inventory.backups], missing_wal(inventory))


async def _problems(store: ObjectStore, backup: Backup) -> list[str]:
    tars = {info.key.rpartition("/")[2]: info.size for info in await list_tars(store, backup.name)}
    sets: list[str] = []
    try:
        sentinel = await read_sentinel(store, backup.name)
        files = None if sentinel.files_metadata_disabled else await read_files_metadata(store, backup.name)
    except RepositoryCorrupt as error:
        return [error.message, *object_problems(backup, tars, sets)]
    files = files or sentinel.embedded_files
    if files is not None:
        sets = list(files.tar_file_sets)
    elif backup.is_delta:
        return ["files_metadata.json is missing", *object_problems(backup, tars, sets)]
    return object_problems(backup, tars, sets)
