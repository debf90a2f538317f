"""Unpacks the base backups of a chain into a data directory, the newest first, several tars at once.

A tar is recorded as done when all that came out of it is durable. Memory is that of the tars in flight, each
`PART_BYTES`, and what `agent.repository.file_names`, `manifest` and `written_pages` say of a file.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext

import structlog

from agent.budget import MemoryBudget
from agent.errors import RepositoryCorrupt
from agent.ports import ObjectInfo, ObjectStore
from agent.processors import processors
from agent.repository.backups import Sentinel
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_reader import read_tar
from agent.restore.parts_done import PartRecord, PartsDone
from agent.restore.unpacker import Building, Unpacker, Unpacking
from agent.restore.wanted import FilesOfBackup, Take, name_of
from agent.tasks import in_thread, task_group
from agent.telemetry.progress import Progress, ReportProgress

PART_BYTES = 8 << 20
"""Memory of a tar that is being unpacked: pieces of 1 MiB as they come and unpacked, and the codec's own."""

# Tars of the backup that is restored, unpacked after all others, and again in each run: they are small.
_LAST_TARS = ("pg_control.tar", "backup_label.tar")

log = structlog.get_logger()


class Source:
    """One base backup of the chain: what its JSON objects say, and its tars."""

    def __init__(self, sentinel: Sentinel, files: FilesOfBackup, tars: Sequence[ObjectInfo]) -> None:
        """Hold these; raise `RepositoryCorrupt` if a tar is absent that is known to hold something wanted."""
        self.sentinel = sentinel
        self.files = files
        self.tars = tars
        present = {_stem(tar.key) for tar in tars}
        for tar, positions in files.tars.items():
            if _stem(tar) not in present and any(files.takes[position] != Take.NOT for position in positions):
                raise RepositoryCorrupt(
                    f"base backup {sentinel.name} lacks its {tar}", hint="Bring it back, or use another backup."
                )
        if not self.parts():
            raise RepositoryCorrupt(f"base backup {sentinel.name} has no tars", hint="Use another backup.")

    def parts(self) -> list[ObjectInfo]:
        """Return the tars of ordinary files."""
        return [tar for tar in self.tars if not _base(tar.key).startswith(_LAST_TARS)]

    def last_tars(self) -> list[ObjectInfo]:
        """Return the tars of pg_control and of the label."""
        return [tar for tar in self.tars if _base(tar.key).startswith(_LAST_TARS)]

    def needed_parts(self, unpacking: Unpacking) -> list[ObjectInfo]:
        """Return the parts that hold something wanted; all, if what they hold is not fully recorded."""
        import numpy as np  # not for those who restore nothing

        needed = unpacking.needed()
        held = {_stem(tar): np.frombuffer(positions, np.int64) for tar, positions in self.files.tars.items()}
        covered = np.zeros(len(needed), np.bool_)
        for positions in held.values():
            covered[positions] = True
        if not held or (needed & ~covered).any():
            return self.parts()
        nothing = np.zeros(0, np.int64)
        return [tar for tar in self.parts() if needed[held.get(_stem(tar.key), nothing)].any()]


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _stem(key: str) -> str:
    return _base(key).partition(".tar")[0]


class Hydration:
    """One run of unpacking."""

    def __init__(
        self,
        store: ObjectStore,
        objects: ObjectFormat,
        building: Building,
        done: PartsDone,
        concurrency: int,
        budget: MemoryBudget | None,
        report: ReportProgress,
    ) -> None:
        self._store = store
        self._objects = objects
        self._building = building
        self._done = done
        self._limit = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._budget = budget
        self._report = report
        # More threads than processors would only take the interpreter from each other, a small file at a time.
        self._threads = ThreadPoolExecutor(processors(), "unpack")
        self._read_bytes = 0
        self._total = 0

    async def unpack(self, sources: Sequence[Source], records: Mapping[str, PartRecord]) -> None:
        """Unpack the base backups `sources`, the full one first, but for the tars in `records`; check the result."""
        with self._threads:
            await self._unpack_sources(sources, records)

    async def _unpack_sources(self, sources: Sequence[Source], records: Mapping[str, PartRecord]) -> None:
        target = sources[-1]
        self._total = sum(tar.size for source in sources for tar in source.parts())
        self._total += sum(tar.size for tar in target.last_tars())
        for source in reversed(sources):
            unpacking = Unpacking(self._building, source.files)
            await self._unpack_parts(source, unpacking, records)
            if source is target:
                await self._unpack_all(unpacking, target.last_tars())
            if missing := await in_thread(unpacking.missing):
                raise await self._lacks(target, unpacking, missing)
        await self._check(target)

    async def _unpack_parts(self, source: Source, unpacking: Unpacking, records: Mapping[str, PartRecord]) -> None:
        done = {tar.key: record for tar in source.parts() if (record := records.get(tar.key)) is not None}
        for record in done.values():
            await in_thread(unpacking.repeat, record)
        needed = [tar for tar in await in_thread(source.needed_parts, unpacking) if tar.key not in done]
        log.info(
            "base backup is unpacked",
            backup_id=unpacking.backup, parts=len(needed), parts_done=len(done), parts_in_all=len(source.parts()),
        )  # fmt: skip
        self._count(sum(tar.size for tar in source.parts()) - sum(tar.size for tar in needed))
        await self._unpack_all(unpacking, needed)

    async def _unpack_all(self, unpacking: Unpacking, tars: Iterable[ObjectInfo]) -> None:
        async with task_group() as group:
            for tar in tars:
                group.create_task(self._unpack(unpacking, tar), name=f"unpack {tar.key}")

    async def _unpack(self, unpacking: Unpacking, tar: ObjectInfo) -> None:
        async with self._limit, self._memory():
            unpacker = Unpacker(unpacking, tar.key)
            try:
                await read_tar(self._store, tar.key, self._objects, unpacker, self._count, executor=self._threads)
                await in_thread(unpacker.sync)
            finally:
                unpacker.close()
            if not _base(tar.key).startswith(_LAST_TARS):
                await in_thread(self._done.write, tar.key, unpacker.record)

    def _memory(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._budget is None else self._budget.reserve(PART_BYTES)

    def _count(self, count: int) -> None:
        self._read_bytes += count
        self._report(Progress("hydrating", self._read_bytes, self._total))

    async def _lacks(self, target: Source, unpacking: Unpacking, missing: Sequence[int]) -> RepositoryCorrupt:
        names = self._building.wanted.names
        name = "" if names is None else await name_of(self._store, target.sentinel, names.digest(missing[0]))
        return RepositoryCorrupt(
            f"base backup {unpacking.backup} lacks {len(missing)} of the files it lists, as {name}",
            hint="A tar of it was lost or replaced: bring it back, or use another backup.",
        )

    async def _check(self, target: Source) -> None:
        """Return if all that the manifest lists is there and right."""
        names = list(self._building.built)
        async with task_group() as group:
            for start in range(self._concurrency):
                share = names[start :: self._concurrency]
                group.create_task(in_thread(self._building.check_built, share), name="check files")
        manifest = self._building.manifest
        if manifest is not None and manifest.unseen:
            raise RepositoryCorrupt(
                f"base backup {target.sentinel.name} lacks {manifest.unseen} of the files in {manifest.key}",
                hint="A tar of it was lost or replaced: bring it back, or use another backup.",
            )
