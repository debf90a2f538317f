"""Tells whether a repository holds what its base backups need.

`verify_repository` looks at listings and the backups' JSON objects alone: every tar, of the recorded size, and unbroken
WAL. `verify_content` reads everything back. One damaged object never hides the others.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from agent.domain.catalog import Backup
from agent.domain.inventory import Inventory, TimelineMap
from agent.domain.verification import MissingWal, missing_wal, object_problems, wal_problem
from agent.domain.wal import segment_name
from agent.errors import ConfigError, RepositoryCorrupt, WrongKey
from agent.ports import Clock, ObjectStore
from agent.repository.backups import list_tars, read_sentinel
from agent.repository.keys import backup_folder, files_metadata_key, manifest_key, metadata_key, sentinel_key
from agent.repository.parent_files import FilesReader
from agent.repository.pieces import take_pieces
from agent.repository.survey import Damage, survey_repository
from agent.repository.wal_archive import WalArchive, WalObject
from agent.tasks import task_group
from agent.telemetry.progress import Progress, ReportProgress
from agent.verify.content import CheckedObject, Reading, check_tar, check_wal, lacking, open_backup

STAGE = "verifying"


@dataclass(frozen=True, slots=True)
class VerifiedBackup:
    """A base backup, and what is wrong with it: nothing, if it is whole."""

    name: str
    problems: Sequence[str]


@dataclass(slots=True)
class Amount:
    """What was read back: objects, and their bytes as stored."""

    objects: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. Oldest base backups first.

    wal_problems: what is wrong with WAL files, timeline histories included, that are there.
    read: what of the content was read; None if only listings were looked at.
    """

    inventory: Inventory
    backups: Sequence[VerifiedBackup]
    gaps: Sequence[MissingWal]
    wal_problems: Sequence[str] = ()
    read: Amount | None = None

    @property
    def problems(self) -> list[str]:
        """All that is wrong, a line each."""
        broken = [f"{each.name}: {problem}" for each in self.backups for problem in each.problems]
        return [*broken, *self.wal_problems, *map(str, self.gaps)]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_if_broken(self) -> None:
        """Raise `RepositoryCorrupt`, which tells of the first problem, unless nothing is wrong."""
        if found := self.problems:
            more = f", and {len(found) - 1} more problems" if len(found) > 1 else ""
            raise RepositoryCorrupt(
                f"{found[0]}{more}", hint="Take a base backup now: pitr backup now --full. What is lost, stays lost."
            )


async def verify_repository(store: ObjectStore, archive: WalArchive, clock: Clock) -> Verification:
    """Look at every base backup's objects, and at the WAL.

    Raises:
        ConfigError: This machine's clock and the store's differ.
        RepositoryError: The repository could not be read.
    """
    damage = Damage()
    inventory = (await survey_repository(store, archive, clock, damage=damage)).inventory
    problems = {name: [error.message] for name, error in damage.backups.items()}
    for backup in inventory.backups:
        problems[backup.name] = await _problems(store, backup)
        if (lacks := wal_problem(inventory, backup)) is not None:
            problems[backup.name].append(lacks)
    wal_problems = [error.message for error in damage.histories]
    return Verification(inventory, _told(inventory, problems), missing_wal(inventory), wal_problems)


def _told(inventory: Inventory, problems: Mapping[str, Sequence[str]]) -> list[VerifiedBackup]:
    """Return every base backup with its problems, to which those of what it builds on are added."""
    names = {backup.name for backup in inventory.backups}
    told = {name: VerifiedBackup(name, list(found)) for name, found in problems.items() if name not in names}
    for backup in sorted(inventory.backups, key=lambda each: each.delta_count):
        found = list(problems.get(backup.name, ()))
        if backup.parent in told and told[backup.parent].problems:
            found.append(f"it builds on {backup.parent}, which is broken")
        told[backup.name] = VerifiedBackup(backup.name, found)
    return [*(told[name] for name in told if name not in names), *(told[each.name] for each in inventory.backups)]


async def _problems(store: ObjectStore, backup: Backup) -> list[str]:
    tars = {info.key.rpartition("/")[2]: info.size for info in await list_tars(store, backup.name)}
    sets: Collection[str] | None = None
    needed = _documents(backup)
    try:
        sentinel = await read_sentinel(store, backup.name)
        if sentinel.embedded_files is not None:
            sets, needed = list(sentinel.embedded_files.tar_file_sets), []
        elif not sentinel.files_metadata_disabled:
            sets = await _listed_tars(store, backup.name)
    except RepositoryCorrupt as error:
        return [error.message, *object_problems(backup, tars, ())]
    keys = {info.key async for info in store.list_folder(backup_folder(backup.name))}
    lost = [f"{key.rpartition('/')[2]} is missing" for key in needed if key not in keys]
    return [*lost, *object_problems(backup, tars, sets or ())]


def _documents(backup: Backup) -> list[str]:
    """Return the keys of the documents that `backup` needs: all if it is ours; WAL-G's full ones do without."""
    files = [files_metadata_key(backup.name)]
    if not backup.counts_corrupt_pages:
        return files if backup.is_delta else []
    return [metadata_key(backup.name), *files, manifest_key(backup.name)]


async def _listed_tars(store: ObjectStore, name: str) -> Collection[str] | None:
    """Return the names of the tars that `files_metadata.json` lists, None if there is no such object."""
    key = files_metadata_key(name)
    tars: set[str] = set()
    reader = FilesReader(key, lambda tar, _: tars.add(tar))

    def take(piece: bytes) -> None:
        deque(reader.take(piece), 0)

    if not await take_pieces(store, key, take):
        return None
    reader.finish()
    return tars


@dataclass(slots=True)
class _Findings:
    """What reading has brought so far."""

    report: ReportProgress
    total: int = 0
    read: Amount = field(default_factory=Amount)
    done: int = 0
    unpacked: int = 0
    wrong_key: WrongKey | None = None

    def on_read(self, count: int) -> None:
        self.done += count
        self.report(Progress(STAGE, self.done, self.total))

    def add(self, checked: CheckedObject) -> None:
        self.read.objects += 1
        self.read.stored_bytes += checked.size
        self.unpacked += checked.wrong_key is None
        self.wrong_key = self.wrong_key or checked.wrong_key


async def verify_content(
    reading: Reading, found: Verification, report: ReportProgress, *, name: str | None = None
) -> Verification:
    """Read back every object of all base backups, and all WAL; return that and what `found` says.

    name: only this base backup, what it builds on, and the WAL that makes it consistent.

    Raises:
        ConfigError: There is no base backup `name`.
        WrongKey: Nothing at all could be decrypted.
        RepositoryError: An object could not be read.
    """
    if name is not None:
        found = _only(found, name)
    files = await _wal_files(reading, found, name)
    findings = _Findings(report, sum(file.size for file in files))
    for backup in found.inventory.backups:
        findings.total += sum(tar.size for tar in await list_tars(reading.store, backup.name))
    problems = {each.name: list(each.problems) for each in found.backups}
    for backup in found.inventory.backups:
        told = await _backup_problems(reading, backup, findings)
        if told and await reading.store.head(sentinel_key(backup.name)) is None:
            del problems[backup.name]  # expired meanwhile
        else:
            problems[backup.name] += [each for each in told if each not in problems[backup.name]]
    wal_problems = list(found.wal_problems)
    async with aclosing(check_wal(reading, files, findings.on_read)) as outcomes:
        async for checked in outcomes:
            findings.add(checked)
            wal_problems += [each for each in checked.problems if each not in wal_problems]
    if findings.wrong_key is not None and not findings.unpacked:
        raise findings.wrong_key
    return Verification(found.inventory, _told(found.inventory, problems), found.gaps, wal_problems, findings.read)


async def _backup_problems(reading: Reading, backup: Backup, findings: _Findings) -> list[str]:
    limit = asyncio.Semaphore(reading.concurrency)
    try:
        content = await open_backup(reading, backup)
    except RepositoryCorrupt as error:
        return [error.message]

    async def check(tar_number: int) -> CheckedObject:
        async with limit:
            return await check_tar(reading, content, content.tars[tar_number], findings.on_read)

    async with task_group() as group:
        tasks = [group.create_task(check(i), name=f"verify {tar.key}") for i, tar in enumerate(content.tars)]
    problems = content.problems
    for task in tasks:
        findings.add(task.result())
        problems += task.result().problems
    if not any(task.result().damage for task in tasks):
        lost = await lacking(reading, content, content.listed.arrived)
        problems += [] if lost is None else [lost]
    return problems


def _only(found: Verification, name: str) -> Verification:
    """Return what `found` says of the base backup `name` and of what it builds on."""
    inventory = found.inventory
    backup = next((each for each in inventory.backups if each.name == name), None)
    if backup is None and not any(each.name == name for each in found.backups):
        raise ConfigError(f"there is no base backup {name}", hint="`pitr backup list` shows what there is.")
    chain = [] if backup is None else [backup, *TimelineMap(inventory).ancestors(backup)]
    names = {name, *(each.name for each in chain)}
    return Verification(
        Inventory(
            inventory.now, [each for each in inventory.backups if each.name in names], inventory.histories,
            inventory.wal, inventory.segment_bytes,
        ),
        [each for each in found.backups if each.name in names],
        [],
    )  # fmt: skip


async def _wal_files(reading: Reading, found: Verification, name: str | None) -> list[WalObject]:
    files = await reading.archive.list_files()
    if name is None:
        return files
    needed = _needed(found.inventory, name)
    return [file for file in files if file.name in needed]


def _needed(inventory: Inventory, name: str) -> Collection[str]:
    """Name the segments that make the base backup `name` consistent."""
    size = inventory.segment_bytes
    return {
        segment_name(backup.timeline, number * size, size)
        for backup in inventory.backups
        if backup.name == name
        for number in TimelineMap(inventory).numbers(backup)
    }
