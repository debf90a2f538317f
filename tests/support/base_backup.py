"""A server that archives with `cp` into a directory, and base backups taken of it: no agent, no hook."""

import io
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from prometheus_client import CollectorRegistry

from agent.backup.limits import BackupLimits
from agent.backup.taker import BackupTaker
from agent.domain.backup_schedule import BackupFrom
from agent.domain.delta_parent import DeltaPolicy
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import make_directory
from agent.ports import Body, Clock
from agent.postgres.connection import PostgresServer
from agent.postgres.data_directory import DataDirectory
from agent.repository.object_format import ObjectFormat
from agent.settings import PostgresSettings
from agent.storage.clock import SystemClock
from agent.storage.directory import DirectoryObjectStore
from agent.telemetry.metrics import Metrics
from agent.telemetry.progress import Progress
from tests.support.object_formats import ZSTD, unpack


class RecordingStore(DirectoryObjectStore):
    """Writes down the keys in the order they were stored; `before_put` and `before_delete` are awaited first."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.stored: list[str] = []
        self.before_put: Callable[[str], Awaitable[None]] | None = None
        self.before_delete: Callable[[Sequence[str]], Awaitable[None]] | None = None

    async def _begin(self, key: str) -> None:
        if self.before_put is not None:
            await self.before_put(key)

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        await self._begin(key)
        await super().put(key, body, metadata=metadata)
        self.stored.append(key)

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        await self._begin(key)
        result = await super().put_if_absent(key, body, metadata=metadata)
        self.stored.append(key)
        return result

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        await self._begin(key)
        size = await super().put_stream(key, chunks, metadata=metadata)
        self.stored.append(key)
        return size

    async def delete(self, keys: Sequence[str]) -> None:
        if self.before_delete is not None:
            await self.before_delete(keys)
        await super().delete(keys)

    def keys(self) -> set[str]:
        """Return every object's key."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}


class QuickClock(SystemClock):
    """The real clock, but nobody sleeps long."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.05))


NO_DELTAS = DeltaPolicy()


@dataclass
class BackupLab:
    """A running server, the repository it archives into, and what its base backups reported."""

    cluster: PostgresCluster
    store: RecordingStore
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))
    progress: list[Progress] = field(default_factory=list)

    def settings(self) -> PostgresSettings:
        return PostgresSettings(str(self.cluster.socket_directory), self.cluster.port, "postgres", None, "postgres")

    def server(self) -> PostgresServer:
        return PostgresServer(self.settings())

    def taker(
        self,
        *,
        objects: ObjectFormat = ZSTD,
        parallel_parts: int = 2,
        part_bytes: int = 4 << 20,
        wal_seconds: float = 60,
        data_directory: Path | None = None,
        clock: Clock | None = None,
        deltas: DeltaPolicy = NO_DELTAS,
        take_from: BackupFrom = BackupFrom.PRIMARY,
        server: PostgresServer | None = None,
    ) -> BackupTaker:
        """Return a taker of this server's base backups; many small parts by default."""
        return BackupTaker(
            self.store,
            server or self.server(),
            DataDirectory(data_directory or self.cluster.data_directory),
            objects,
            BackupLimits(parallel_parts, part_bytes, wal_seconds),
            clock or SystemClock(),
            self.metrics,
            deltas,
            take_from,
        )


def start_lab(cluster: PostgresCluster, directory: Path) -> BackupLab:
    """Start `cluster` with archive_command copying into a new repository in `directory`."""
    wal = directory / "bucket" / "wal_005"
    make_directory(wal.parent)
    make_directory(wal)
    cluster.configure(archive_mode="on", archive_command=f"cp %p {wal}/.pitr-tmp-%f && mv {wal}/.pitr-tmp-%f {wal}/%f")
    cluster.start()
    return BackupLab(cluster, RecordingStore(wal.parent))


@contextmanager
def rows_changing(cluster: PostgresCluster) -> Iterator[None]:
    """Meanwhile insert and update rows, and create, fill, truncate and drop tables and a database."""
    cluster.execute("CREATE TABLE busy (id bigserial PRIMARY KEY, filler text, changed int DEFAULT 0)")
    enough = threading.Event()
    errors: list[psycopg.Error] = []

    def change() -> None:
        number = 0
        try:
            with cluster.connect() as session:
                while not enough.is_set():
                    number += 1
                    session.execute("INSERT INTO busy (filler) SELECT repeat('x', 200) FROM generate_series(1, 50)")
                    session.execute("UPDATE busy SET changed = changed + 1 WHERE id %% 7 = %s", [number % 7])
                    session.execute("CREATE TABLE passing AS SELECT generate_series(1, 2000) AS id")
                    session.execute("VACUUM FULL passing" if number % 2 else "TRUNCATE passing")
                    session.execute("DROP TABLE passing")
                    if number % 5 == 1:
                        # As all did before 15: files are copied, and no page is logged.
                        by_files = number % 10 == 1 and session.info.server_version >= 150000
                        session.execute("CREATE DATABASE passing" + " STRATEGY FILE_COPY" * by_files)
                        session.execute("DROP DATABASE passing")
        except psycopg.Error as error:
            errors.append(error)

    thread = threading.Thread(target=change, name="rows changing")
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
    assert not errors, errors


@dataclass(frozen=True)
class Member:
    """A tar member as Python's own reader sees it, with its name as it is in the header."""

    tar: str
    name: str
    info: tarfile.TarInfo
    content: bytes


def read_members(tar: str, packed: bytes, objects: ObjectFormat = ZSTD) -> list[Member]:
    """Return the members of the tar object called `tar`."""
    plain = unpack(objects, tar, packed)
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
        return [_member(tar, archive, info) for info in archive]


def _member(tar: str, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    file = archive.extractfile(info)
    name = info.name or "/"  # Python drops slashes at the end
    return Member(tar, name, info, file.read() if file is not None else b"")


def extract(members: list[Member], destination: Path) -> None:
    """Write the members below `destination` as WAL-G would: pg_control and the labels last."""
    make_directory(destination)
    for member in sorted(members, key=lambda member: not member.tar.startswith("part_")):
        path = destination / member.name.lstrip("/")
        if member.info.isdir():
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(member.content)
        path.chmod(member.info.mode)
