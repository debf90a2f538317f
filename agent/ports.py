"""What the services need from the world outside, as Protocols with their whole contract."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, TypeAlias

from agent.domain.timeline import Stretch
from agent.errors import RepositoryError

if TYPE_CHECKING:
    from agent.domain.wal_summaries import ChangedBlocks  # imports numpy, which most commands can do without

Body: TypeAlias = bytes | bytearray | memoryview
"""Bytes to be stored. They are not changed, nor kept after the call returns."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object.

    `key` is relative to the repository prefix, without a leading slash. `modified_at` is the store's own time (aware,
    UTC). `metadata` is the object's user metadata with lower-case names: filled by `head`, `get` and `open`, empty in
    listings and in stores that cannot keep it.
    """

    key: str
    size: int
    modified_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object's description and its whole content."""

    info: ObjectInfo
    body: bytes


@dataclass(frozen=True, slots=True)
class OpenObject:
    """An object's description, with its metadata, and its content in pieces of at most 1 MiB, to be read once."""

    info: ObjectInfo
    pieces: AsyncIterator[bytes]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.pieces


@dataclass(frozen=True, slots=True)
class Deletion:
    """What came of removing objects.

    failed: keys that could not be removed, and why. keeps_versions: the store hid what was removed and keeps its bytes
    as older versions; False also where the store does not tell.
    """

    failed: Mapping[str, RepositoryError] = field(default_factory=dict)
    keeps_versions: bool = False

    def raise_first(self) -> None:
        """Raise the error of the first key that could not be removed, if there is one."""
        for error in self.failed.values():
            raise error


@dataclass(frozen=True, slots=True)
class DeletedVersion:
    """What brings a deleted object back, and its metadata; none if that cannot be read."""

    version: str
    metadata: Mapping[str, str]


class ObjectStore(Protocol):
    """Named objects below one prefix, durable once a `put` returns. Raises only `RepositoryError`.

    A missing object is an answer (`None`), not an error: "absent" is never confused with "could not look". A missing
    bucket, or a permission that hides objects, is `RepositoryRefused`.
    """

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """Store `body` unless `key` exists. Return True if it was stored, False if `key` was there already.

        Of several concurrent callers at most one gets True, and `key` holds exactly its bytes. False may also mean
        that an earlier attempt of this very call was stored and its answer lost: the caller compares.
        """

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """Store `body` under `key`, replacing what is there."""

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """Store the concatenated `chunks` under `key`, replacing what is there; return the size in bytes.

        The object is visible only when whole. If `chunks` raises, or the call is cancelled, nothing is stored and
        nothing is left over. Memory used is at most two parts plus one chunk, whatever the size of the object.
        """

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `put_stream`, unless `key` exists: then return None, with `chunks` read or not.

        Of several concurrent callers at most one gets its size, and `key` holds its bytes. None as False of
        `put_if_absent`: the caller compares.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """Describe the object, with its metadata, or return None if it is absent."""

    async def get(self, key: str) -> StoredObject | None:
        """Return the whole object, or None if it is absent."""

    def open(self, key: str) -> AbstractAsyncContextManager[OpenObject | None]:
        """Read an object in pieces of at most 1 MiB; the context is None if it is absent.

        A body shorter than the object raises `RepositoryUnavailable` while it is read.
        """

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix` and is greater than `after`, in key order."""

    def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """Yield the objects directly in `folder` (ends with a slash), not those in folders below it, in key order."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; absent ones are no error. Returns when all are gone, raises if one could not be removed."""

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """Remove every object that can be removed, in no particular order; absent ones are no error.

        What is locked, or forbidden, is told and does not keep the others from being removed. Raises if the store does
        not answer or refuses the whole: then nothing is known of what is left, and the call can be made again.
        """

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """Return which keys that begin with `prefix` were deleted though the store keeps their bytes.

        With each key the version that brings it back. None of them where the store keeps no versions, or does not tell.
        Of use for few keys: one request for each.
        """

    async def check(self) -> None:
        """Return if the store answers and the bucket (directory) can be listed, else raise `RepositoryError`."""

    async def time(self) -> datetime:
        """Return the store's own time of day (aware, UTC), to the second; this machine's where it does not tell."""

    async def close(self) -> None:
        """Release connections. The store cannot be used afterwards."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a running PostgreSQL server says of itself.

    started_at: when its postmaster began.
    redo_lsn: the redo point of its last checkpoint, or restartpoint, by its own control file.
    libc: version of the C library that it sorts text by, None if it does not tell.
    config_outside: its configuration files that are not in the data directory.
    """

    version_num: int
    system_identifier: int
    in_recovery: bool
    timeline: int
    data_directory: str
    segment_bytes: int
    archive_mode: str
    archive_command: str
    archive_library: str
    wal_level: str
    wal_log_hints: bool
    started_at: datetime
    redo_lsn: int
    libc: str | None = None
    config_outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupStop:
    """Answer of pg_backup_stop: the stop LSN, and the two files byte for byte."""

    stop_lsn: int
    backup_label: bytes
    tablespace_map: bytes


class BackupSession(Protocol):
    """The one database session in which a base backup starts and stops. Losing it aborts the backup."""

    async def start(self, label: str, *, fast: bool = True) -> int:
        """Begin the backup with a checkpoint, and return its start LSN.

        The checkpoint is written at once, or if not `fast` spread over time as any other.
        """

    async def stop(self) -> BackupStop:
        """End the backup without waiting for WAL to be archived."""

    async def ping(self) -> None:
        """Return if the session is alive, else raise `PostgresError`."""


@dataclass(frozen=True, slots=True)
class NoSummaries:
    """The server's WAL summaries do not say it. `reason`: why, lower case, without a full stop."""

    reason: str


class Postgres(Protocol):
    """A running PostgreSQL server. Raises only `PostgresError`."""

    async def server(self) -> ServerInfo:
        """Ask the server for its identity and the settings that archiving depends on."""

    def backup_session(self) -> AbstractAsyncContextManager[BackupSession]:
        """Open a session of its own with every timeout off; leaving the context closes it."""

    def only_backup(self) -> AbstractAsyncContextManager[None]:
        """Raise `BackupElsewhere` if another agent is inside this context, on the same server and database."""

    async def switch_wal(self) -> int:
        """Switch to a new WAL segment; return the LSN at the end of the old one."""

    async def changed_blocks(
        self, path: Sequence[Stretch], start_lsn: int, end_lsn: int
    ) -> "ChangedBlocks | NoSummaries":
        """Return which blocks the WAL on `path` from `start_lsn` up to `end_lsn` changed, or why that is not known."""


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> datetime:
        """Return the time of day, aware, UTC."""

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
