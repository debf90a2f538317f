"""Reads one WAL file out of pg_wal, packs it and stores it.

Memory, reserved before it is used: twice the file's size while it is packed as a whole, up to 32 MiB each; a larger
file is streamed in parts, three of which are in memory at most, whatever its size.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from agent.budget import MemoryBudget
from agent.domain.wal import LONG_HEADER_BYTES, WalFileKind, segment_problem, wal_file_kind
from agent.errors import ConfigError, WalRefused
from agent.postgres.data_directory import DataDirectory
from agent.postgres.wal_file import FileState, WalFile
from agent.processors import processors
from agent.repository.tar_parts import in_threads
from agent.repository.wal_archive import Stored, WalArchive
from agent.repository.wal_packing import WHOLE_BYTES, Description
from agent.tasks import in_thread, task_group

STREAM_BYTES = 48 << 20
"""Memory of one streamed file: two parts of 16 MiB on their way, a copy or chunk, and the compressor."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was stored, of which content, and the state of the file that held it."""

    description: Description
    stored: Stored
    state: FileState


class WalUploader:
    """Uploads WAL files, as many at once as the budget lets, packing with a thread for each usable processor."""

    def __init__(self, archive: WalArchive, data_directory: DataDirectory, budget: MemoryBudget) -> None:
        self._archive = archive
        self._data_directory = data_directory
        self._budget = budget
        self._executor = ThreadPoolExecutor(processors(), thread_name_prefix="pack")

    async def upload(self, name: str, system_identifier: int) -> Uploaded:
        """Return once pg_wal/`name` of this database cluster is durable in the repository.

        Raises:
            WalConflict: The repository holds other bytes under this name.
            WalRefused: The file is not what its name says, or of another database cluster, or changed meanwhile.
            ConfigError: It cannot be read.
            RepositoryError: It could not be stored, or that could not be confirmed.
        """
        state = await asyncio.to_thread(self._data_directory.wal_file_state, name)
        size = 0 if state is None else state.size
        if size > WHOLE_BYTES:
            async with self._budget.reserve(STREAM_BYTES):
                return await self._upload_stream(name, system_identifier)
        async with self._budget.reserve(2 * size):
            return await self._upload_whole(name, system_identifier)

    async def _upload_whole(self, name: str, system_identifier: int) -> Uploaded:
        pack = self._archive.packer.pack
        packed, state = await self._read(name, system_identifier, lambda file: pack(file, system_identifier))
        return Uploaded(packed.description, await self._archive.store(packed), state)

    async def _upload_stream(self, name: str, system_identifier: int) -> Uploaded:
        describe = self._archive.packer.describe
        description, state = await self._read(name, system_identifier, lambda file: describe(file, system_identifier))
        async with aclosing(in_threads(self._packed(description), self._executor)) as chunks:
            return Uploaded(description, await self._archive.store_stream(description, chunks), state)

    async def _read(self, name: str, system_identifier: int, use: Callable[[WalFile], T]) -> tuple[T, FileState]:
        """Return what `use` makes of the file, and its state; meanwhile ask what the repository has of this name."""

        def read() -> tuple[T, FileState]:
            try:
                with self._data_directory.open_wal_file(name) as file:
                    _require_archivable(file, system_identifier)
                    return use(file), file.state
            except OSError as error:
                raise _unreadable(name, error) from error

        async with task_group() as group:
            group.create_task(self._archive.foresee(name), name=f"foresee {name}")
            # Cancelled, it waits for the thread: what that has in memory stays reserved until then.
            return await in_thread(read, executor=self._executor)

    def _packed(self, description: Description) -> Generator[bytes, None, None]:
        try:
            with self._data_directory.open_wal_file(description.name) as file:
                yield from self._archive.packer.stream(file, description)
        except OSError as error:
            raise _unreadable(description.name, error) from error


def _unreadable(name: str, error: OSError) -> ConfigError:
    return ConfigError(
        f'WAL file "{name}" cannot be read: {error.strerror}', hint="Run the agent as a user that may read PGDATA."
    )


def _require_archivable(file: WalFile, system_identifier: int) -> None:
    """Return if the file is what its name says, and of this database cluster, else raise `WalRefused`."""
    problem = None
    if wal_file_kind(file.name) in (WalFileKind.SEGMENT, WalFileKind.PARTIAL):
        problem = segment_problem(file.name, file.size, file.part(0, LONG_HEADER_BYTES), system_identifier)
    elif not file.size:
        problem = "it is empty"
    if problem is not None:
        raise WalRefused(
            f'WAL file "{file.name}" is not archived: {problem}',
            hint="Check that the agent's PGDATA is this server's data directory, and its disk.",
        )
