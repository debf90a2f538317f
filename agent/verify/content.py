"""Reads back what a repository holds: the tars of base backups, and WAL files. Nothing is kept of the content.

What cannot be unpacked is read a second time: a body that was damaged on the way looks like a damaged object.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field

import google_crc32c

from agent.budget import MemoryBudget
from agent.domain.catalog import Backup
from agent.domain.control_file import parse_control_file
from agent.domain.lsn import format_lsn
from agent.domain.wal_check import CheckedSegment, continuation_problem, wal_ends_in
from agent.errors import RepositoryCorrupt, WrongKey
from agent.ports import ObjectInfo, ObjectStore
from agent.postgres.page_check import PageRules, page_rules
from agent.repository.backup_control_file import read_backup_control_file
from agent.repository.backups import Sentinel, list_tars, read_sentinel
from agent.repository.object_format import ObjectFormat
from agent.repository.read_twice import read_twice
from agent.repository.tar_reader import read_tar
from agent.repository.wal_archive import Downloaded, WalArchive, WalObject
from agent.tasks import in_thread
from agent.verify.listed_files import ListedFiles, first_missing, read_listed_files
from agent.verify.tar_check import TarCheck

OBJECT_BYTES = 32 << 20
"""Memory that reading one object takes: pieces as stored, decrypted, decompressed and joined, and the codec's own."""

ReadBytes = Callable[[int], None]
"""Is told how many more stored bytes were read."""


@dataclass(frozen=True, slots=True)
class CheckedObject:
    """One object that was read. `damage`: why it could not be unpacked to its end."""

    key: str
    size: int
    problems: Sequence[str] = ()
    damage: RepositoryCorrupt | None = None

    @property
    def wrong_key(self) -> WrongKey | None:
        """Why it could not be unpacked from its very beginning."""
        return self.damage if isinstance(self.damage, WrongKey) else None


@dataclass(frozen=True, slots=True)
class Reading:
    """How objects are read: from where, how many at once, with which memory and threads."""

    store: ObjectStore
    objects: ObjectFormat
    archive: WalArchive
    concurrency: int
    memory: MemoryBudget = field(default_factory=lambda: MemoryBudget(256 << 20))
    executor: Executor | None = None


@dataclass(slots=True)
class BackupContent:
    """One base backup whose tars are to be read. `problems`: what is wrong with what it says of itself."""

    sentinel: Sentinel
    tars: Sequence[ObjectInfo]
    listed: ListedFiles
    rules: PageRules | None
    problems: list[str]


async def open_backup(reading: Reading, backup: Backup) -> BackupContent:
    """Read what `backup` says of its files.

    Raises:
        RepositoryCorrupt: It has no sentinel any more, or one that cannot be understood.
        RepositoryError: It could not be read.
    """
    problems: list[str] = []
    sentinel = await read_sentinel(reading.store, backup.name)
    listed = await read_listed_files(reading.store, reading.objects, sentinel, problems)
    rules = await _page_rules(reading, backup)
    return BackupContent(sentinel, await list_tars(reading.store, backup.name), listed, rules, problems)


async def _page_rules(reading: Reading, backup: Backup) -> PageRules | None:
    """Return the rules for pages with checksums, None if the backup's have none, or if that cannot be told."""

    def rules(content: bytes) -> PageRules | None:
        return page_rules(parse_control_file(content, google_crc32c.value), backup.start_lsn)

    try:
        content = await read_backup_control_file(reading.store, reading.objects, backup.name)
        return await in_thread(rules, content)
    except (RepositoryCorrupt, ValueError):  # reading its tar tells
        return None


async def check_tar(reading: Reading, content: BackupContent, tar: ObjectInfo, on_read: ReadBytes) -> CheckedObject:
    """Read one tar and check it.

    Raises:
        RepositoryError: It could not be read.
    """

    async def read() -> TarCheck:
        check = TarCheck(content.listed, content.rules, tar.key)
        async with reading.memory.reserve(OBJECT_BYTES, background=True):
            await read_tar(reading.store, tar.key, reading.objects, check, on_read, executor=reading.executor)
        return check

    try:
        check = await read_twice(read, "object read again", key=tar.key)
    except RepositoryCorrupt as error:
        return _damaged(tar.key, tar.size, error)
    problems = check.problems
    if again := content.listed.arrive(check.arrived):
        problems.append(f"{tar.key} holds {again} files that another tar holds, too")
    return CheckedObject(tar.key, tar.size, problems)


async def lacking(reading: Reading, content: BackupContent, arrived: int) -> str | None:
    """Say what is missing of the listed files, now that all tars were read and had `arrived` of them."""
    missing = content.listed.expected - arrived if content.listed.is_complete else 0
    if missing <= 0:
        return None
    is_all_of_it = arrived == content.listed.arrived  # else some were read by another process
    name = await first_missing(reading.store, content.sentinel, content.listed) if is_all_of_it else None
    return f"its tars lack {missing} of the files it lists" + (f", as {name}" if name else "")


@dataclass(frozen=True, slots=True)
class _Walked:
    """A segment whose records were walked, because nothing else proves its content. `ends`: the WAL ends in it."""

    file: WalObject
    segment: CheckedSegment
    ends: bool


async def check_wal(
    reading: Reading, files: Iterable[WalObject], on_read: ReadBytes
) -> AsyncGenerator[CheckedObject, None]:
    """Read WAL files, which are in the order of their names; yield each when it was checked, in that order.

    One that is expired meanwhile is passed over.

    Raises:
        RepositoryError: One could not be read.
    """
    before: _Walked | None = None
    async with aclosing(_in_order(reading, files)) as outcomes:
        async for file, outcome in outcomes:
            on_read(file.size)
            if outcome is None or isinstance(outcome, RepositoryCorrupt):
                before = None
                if outcome is not None:
                    yield _damaged(file.key, file.size, outcome)
                continue
            problem, before = _continuity(before, file, outcome.records)
            yield CheckedObject(file.key, file.size, [] if problem is None else [problem])


def _continuity(
    before: _Walked | None, file: WalObject, segment: CheckedSegment | None
) -> tuple[str | None, _Walked | None]:
    """Return what only a segment and the one before it tell together, and what to know of it for the next."""
    if segment is None:
        return None, None
    if before is not None and (before.file.name[:8] != file.name[:8] or before.segment.end_lsn > segment.start_lsn):
        before = None
    adjacent = before is not None and before.segment.end_lsn == segment.start_lsn
    earlier = before.segment if before is not None and adjacent else None
    problem = None if earlier is None else continuation_problem(earlier, segment)
    if problem is not None:
        problem = f"{file.key} cannot be replayed: {problem}"
    if before is not None and before.ends:
        where = format_lsn(before.segment.ended_at or 0)
        problem = f"{before.file.key} cannot be replayed: its WAL ends at {where}, and later WAL is in the archive"
    return problem, _Walked(file, segment, wal_ends_in(earlier, segment))


async def _in_order(
    reading: Reading, files: Iterable[WalObject]
) -> AsyncGenerator[tuple[WalObject, Downloaded | RepositoryCorrupt | None], None]:
    """Read some files at once, and yield them in their order."""
    waiting: deque[tuple[WalObject, asyncio.Task[Downloaded | RepositoryCorrupt | None]]] = deque()
    try:
        for file in files:
            waiting.append((file, asyncio.create_task(_wal_file(reading, file), name=f"verify {file.name}")))
            if len(waiting) == reading.concurrency:
                yield waiting[0][0], await waiting[0][1]
                waiting.popleft()
        while waiting:
            yield waiting[0][0], await waiting[0][1]
            waiting.popleft()
    finally:
        for _, task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait([task for _, task in waiting])


async def _wal_file(reading: Reading, file: WalObject) -> Downloaded | RepositoryCorrupt | None:
    async def read() -> Downloaded | None:
        async with reading.memory.reserve(OBJECT_BYTES, background=True):
            return await reading.archive.download(file.name, lambda _piece: None, executor=reading.executor)

    try:
        return await read_twice(read, "object read again", key=file.key)
    except RepositoryCorrupt as error:
        return error


def _damaged(key: str, size: int, error: RepositoryCorrupt) -> CheckedObject:
    message = error.message if key in error.message else f"{key}: {error.message}"
    return CheckedObject(key, size, [message], error)
