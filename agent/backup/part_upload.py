"""Packs the files of a data directory into tar parts and uploads them, several parts at once."""

import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import structlog

from agent.backup.limits import BackupLimits, RateLimit
from agent.backup.record import BackupRecord
from agent.ports import Clock, ObjectStore
from agent.postgres.data_files import DataFile
from agent.postgres.file_content import OpenContent
from agent.repository.keys import tar_part_name
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_parts import PACKING_BYTES, TarPart, in_threads
from agent.tasks import in_thread, task_group

_PART_MEMORY = PACKING_BYTES + (40 << 20)  # and two parts of a multipart upload with one chunk, see `put_stream`

# What one thread takes from the walk at a time, at most.
_FILES_AT_ONCE = 64
_BYTES_AT_ONCE = 1 << 20

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(slots=True)
class Totals:
    """What was packed so far.

    members: files and directories. content_bytes: the tars' content. catalog_bytes: sizes of what was walked,
    directories too. done_bytes: size of the files dealt with. read_bytes: what was read of them. stored_bytes: of the
    tars as stored. tars: how many. corrupt_pages: pages with a wrong checksum.
    """

    members: int = 0
    content_bytes: int = 0
    catalog_bytes: int = 0
    done_bytes: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    tars: int = 0
    corrupt_pages: int = 0


class _Shared:
    """The files, for several threads: each takes some small ones at a time, or a large one, to wait for others less."""

    def __init__(self, files: Iterator[DataFile]) -> None:
        self._files = files
        self._lock = threading.Lock()

    def for_one(self) -> Iterator[DataFile]:
        """Yield what falls to one thread."""
        while some := self._some():
            yield from some

    def _some(self) -> list[DataFile]:
        some, size = [], 0
        with self._lock:
            for file in self._files:
                some.append(file)
                size += file.status.st_size
                if len(some) == _FILES_AT_ONCE or size >= _BYTES_AT_ONCE:
                    break
        return some


class PartUpload:
    """Uploads the files of a base backup as tar parts into the tar folder `folder`, several parts at once.

    Memory: `_PART_MEMORY` for each part at work, reserved from the budget. `report` is told the bytes of files dealt
    with so far. To be closed, when nothing runs any more.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: str,
        objects: ObjectFormat,
        limits: BackupLimits,
        clock: Clock,
        record: BackupRecord,
        report: Callable[[int], None],
    ) -> None:
        self._store = store
        self._folder = folder
        self._objects = objects
        self._limits = limits
        self._record = record
        self._report = report
        self._disk = RateLimit(limits.disk_rate, clock)
        self._network = RateLimit(limits.network_rate, clock)
        self._threads = limits.threads()
        self._parts_begun = 0
        self._at_work: list[TarPart] = []
        self.totals = Totals()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    async def upload(self, files: Iterator[DataFile], open_content: OpenContent) -> None:
        """Return when every one of `files` is durable in some part, and recorded.

        Raises:
            BackupFailed: A file cannot be read.
            RepositoryError: A part cannot be stored.
        """
        shared = _Shared(files)
        async with task_group() as group:
            for number in range(self._limits.parallel_parts):
                group.create_task(self._upload_parts(shared.for_one(), open_content), name=f"tar parts {number}")

    async def _upload_parts(self, files: Iterator[DataFile], open_content: OpenContent) -> None:
        is_done = False
        while not is_done:
            async with self._limits.memory.reserve(_PART_MEMORY, background=True):
                first = await self._in_thread(next, files, None)
                if first is not None:
                    await self._upload_part(chain([first], files), open_content)
                is_done = first is None

    async def _upload_part(self, files: Iterator[DataFile], open_content: OpenContent) -> None:
        self._parts_begun += 1
        name = tar_part_name(self._parts_begun, self._objects.extension)
        part = TarPart(name, self._objects, open_content)
        self._at_work.append(part)
        async with aclosing(self._packed(part, files)) as chunks:
            stored_bytes = await self._store.put_stream(self._folder + part.name, chunks)
        await self._in_thread(self._record.add_tar, part.name, part.files)
        self._at_work.remove(part)
        self._count(part, stored_bytes)

    async def _packed(self, part: TarPart, files: Iterator[DataFile]) -> AsyncGenerator[bytes, None]:
        read = 0
        async with aclosing(in_threads(part.pack(files, self._limits.part_bytes), self._threads)) as chunks:
            async for chunk in chunks:
                self._report_progress()
                await self._disk.passed(part.read_bytes - read)
                await self._network.passed(len(chunk))
                read = part.read_bytes
                if chunk:
                    yield chunk

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await in_thread(function, *arguments, executor=self._threads)

    def _report_progress(self) -> None:
        self._report(self.totals.done_bytes + sum(part.done_bytes for part in self._at_work))

    def _count(self, part: TarPart, stored_bytes: int) -> None:
        self.totals.members += len(part.files)
        self.totals.catalog_bytes += part.catalog_bytes
        self.totals.done_bytes += part.done_bytes
        self.totals.read_bytes += part.read_bytes
        self.totals.corrupt_pages += sum(file.corrupt.count for file in part.files)
        self.count_tar(part.content_bytes, stored_bytes)
        log.debug("tar part stored", tar=part.name, members=len(part.files), stored_bytes=stored_bytes)
        if part.vanished:
            log.info("files vanished before they were read", files=len(part.vanished), examples=part.vanished[:3])

    def count_tar(self, content_bytes: int, stored_bytes: int) -> None:
        """Add a tar that somebody else stored to the totals."""
        self.totals.content_bytes += content_bytes
        self.totals.stored_bytes += stored_bytes
        self.totals.tars += 1
