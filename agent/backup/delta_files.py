"""Opens the files of the data directory for a delta: what of each is stored.

Everything here blocks for file I/O and is called by several threads at once.
"""

import os
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TypeAlias

from agent.backup.visibility import blocks_newly_mapped
from agent.domain.backup_file import CorruptBlocks, MemberKind
from agent.domain.delta_file import (
    Blocks,
    RelationSegment,
    is_paged,
    may_be_left_out,
    relation_segment,
    was_there_before,
)
from agent.domain.page import PAGE_BYTES, changed_pages
from agent.domain.wal_summaries import ChangedBlocks
from agent.postgres.data_files import DataFile, refused
from agent.postgres.file_content import READ_BYTES, FileContent, OpenContent, open_regular
from agent.postgres.page_check import PageCheck, PageRules
from agent.repository.increments import increment_bytes, increment_head
from agent.repository.parent_files import ParentFiles

_WORTH_IT = 0.9  # with more of its pages changed a file is stored whole: it restores sooner
_RUN_PAGES = READ_BYTES // PAGE_BYTES

FindChanges: TypeAlias = Callable[[int, str, RelationSegment, int], tuple[Blocks | None, int]]
"""Finds the changed blocks of an open file: descriptor, path, which file, its size. Returns them (None: store the file
whole) and how many bytes were read to find them."""


def by_page_lsn(since_lsn: int, blocks_per_segment: int, *, hints_are_logged: bool) -> FindChanges:
    """Find changes by reading every page: those with an LSN from `since_lsn`.

    Without `hints_are_logged` also those that may have been marked all-visible since.
    """

    def find(descriptor: int, path: str, segment: RelationSegment, size: int) -> tuple[Blocks | None, int]:
        found, block, mapped = array("I"), 0, None
        if not hints_are_logged:
            mapped = blocks_newly_mapped(path, segment, size // PAGE_BYTES, blocks_per_segment, since_lsn)
        while block * PAGE_BYTES < size:
            pages = os.pread(descriptor, min(READ_BYTES, size - block * PAGE_BYTES), block * PAGE_BYTES)
            changed = changed_pages(pages, since_lsn, mapped and mapped[block : block + len(pages) // PAGE_BYTES])
            if changed is None:
                return None, block * PAGE_BYTES + len(pages)
            if not changed:  # cut meanwhile: so does WAL replay
                break
            found.extend(compress(range(block, block + len(changed)), changed))
            block += len(changed)
        return found, block * PAGE_BYTES

    return find


def by_wal_summaries(changed: ChangedBlocks, blocks_per_segment: int) -> FindChanges:
    """Find changes without reading anything, by what the server's WAL summaries say."""

    def find(_: int, _path: str, segment: RelationSegment, size: int) -> tuple[Blocks | None, int]:
        return changed.of(segment, size // PAGE_BYTES, blocks_per_segment), 0

    return find


@dataclass(slots=True)
class DeltaCounts:
    """What a delta holds so far: files left out, stored as increments and whole; pages in increments."""

    left_out: int = 0
    increments: int = 0
    whole: int = 0
    pages: int = 0


class LeftOutFile:
    """A file that is only mentioned: the parent has it as it is."""

    kind = MemberKind.SKIPPED
    member_bytes = 0
    scanned_bytes = 0
    crc32c: int | None = None
    corrupt = CorruptBlocks()

    def __init__(self, status: os.stat_result) -> None:
        self.status = status

    def pieces(self) -> Iterator[bytes]:
        """As `FileContent`."""
        return iter(())

    def close(self) -> None:
        """As `FileContent`."""


class Increment:
    """The pages `blocks` of a relation file, in WAL-G's format; see `agent.repository.increments`.

    A page that is gone when it is read, because the file was cut, is stored as zeros; WAL replay cuts the file too.
    """

    kind = MemberKind.INCREMENT

    def __init__(self, descriptor: int, status: os.stat_result, blocks: Blocks, check: PageCheck | None) -> None:
        self.status = status
        self.member_bytes = increment_bytes(len(blocks))
        self.scanned_bytes = 0
        self.crc32c: int | None = None
        self.corrupt = CorruptBlocks()
        self._descriptor = descriptor
        self._blocks = blocks
        self._check = check

    def pieces(self) -> Iterator[bytes]:
        """As `FileContent`."""
        yield increment_head(self.status.st_size, array("I", self._blocks).tobytes())
        for first, count in _runs(self._blocks):
            offset, size = first * PAGE_BYTES, count * PAGE_BYTES
            pages = os.pread(self._descriptor, size, offset).ljust(size, b"\0")
            yield pages if self._check is None else self._check.verified(pages, offset)
        if self._check is not None:
            self._check.tell()
            self.corrupt = self._check.corrupt

    def close(self) -> None:
        """As `FileContent`."""
        os.close(self._descriptor)


def _runs(blocks: Blocks) -> Iterator[tuple[int, int]]:
    """Yield runs of consecutive blocks, of `_RUN_PAGES` at most: the first, and how many."""
    count = 0
    for position, block in enumerate(blocks):
        if count and (block != blocks[position - 1] + 1 or count == _RUN_PAGES):
            yield blocks[position - count], count
            count = 0
        count += 1
    if count:
        yield blocks[-count], count


class DeltaFiles:
    """Opens every file of the backup, and decides by the parent what of it is stored. `open` implements `OpenContent`.

    parent: the parent's files. parent_started_ns: when it began, nanoseconds since 1970.
    find_changes: see `FindChanges`. open_whole: opens what is stored whole.
    rules: those for pages with checksums, None if they have none. data_directory: PGDATA.
    """

    def __init__(
        self,
        parent: ParentFiles,
        parent_started_ns: int,
        find_changes: FindChanges,
        open_whole: OpenContent,
        rules: PageRules | None,
        data_directory: Path,
    ) -> None:
        self.counts = DeltaCounts()
        self._parent = parent
        self._parent_started_ns = parent_started_ns
        self._find_changes = find_changes
        self._open_whole = open_whole
        self._rules = rules
        self._data_directory = data_directory
        self._is_old_database: dict[int, bool] = {}
        self._lock = threading.Lock()

    def open(self, file: DataFile) -> FileContent | None:
        """Implements `OpenContent`."""
        mtime_ns = file.status.st_mtime_ns
        if may_be_left_out(mtime_ns, self._parent.mtime_ns(file.name), self._parent_started_ns):
            with self._lock:
                self.counts.left_out += 1
            return LeftOutFile(file.status)
        segment = relation_segment(file.name)
        if segment is None or file.name not in self._parent:
            return self._whole(file)
        try:
            increment, scanned = self._increment(file, segment) if self._is_old(segment.database) else (None, 0)
        except OSError as error:
            raise refused(file.path, error) from error
        content = increment or self._whole(file)
        if content is not None:
            content.scanned_bytes = scanned
        return content

    def _whole(self, file: DataFile) -> FileContent | None:
        content = self._open_whole(file)
        if content is not None:
            with self._lock:
                self.counts.whole += 1
        return content

    def _increment(self, file: DataFile, segment: RelationSegment) -> tuple[Increment | None, int]:
        """Open the file as an increment, or not if it is to be stored whole; tell the bytes read to find that out."""
        opened = open_regular(file)
        if opened is None:
            return None, 0
        descriptor, status = opened
        increment, blocks, scanned = None, None, 0
        try:
            if is_paged(file.name, status.st_size):
                blocks, scanned = self._find_changes(descriptor, file.path, segment, status.st_size)
            if blocks is not None and len(blocks) * PAGE_BYTES <= status.st_size * _WORTH_IT:
                check = PageCheck(self._rules, file.path, descriptor, segment.segment) if self._rules else None
                increment = Increment(descriptor, status, blocks, check)
                with self._lock:
                    self.counts.increments += 1
                    self.counts.pages += len(blocks)
        finally:
            if increment is None:
                os.close(descriptor)
        return increment, scanned

    def _is_old(self, database: int) -> bool:
        """Tell whether the database is the one that the parent has under this OID.

        Its PG_VERSION is written once, when it is made or moved.
        """
        known = self._is_old_database.get(database)
        if known is None:
            places = [self._data_directory / "base", *self._data_directory.glob("pg_tblspc/*/PG_*")]
            found = [path for place in places if (path := place / str(database) / "PG_VERSION").exists()]
            known = bool(found) and all(self._was_there(path) for path in found)
            self._is_old_database[database] = known
        return known

    def _was_there(self, path: Path) -> bool:
        name = f"/{path.relative_to(self._data_directory)}"
        return name in self._parent and was_there_before(path.stat().st_mtime_ns, self._parent_started_ns)
