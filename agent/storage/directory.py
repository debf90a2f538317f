"""`ObjectStore` in a local directory (`WALG_FILE_PREFIX`), laid out as WAL-G's file storage.

Invariants: an object appears under its name when it is whole and durable (temporary name, fsync, link or rename, fsync
of the directory); a link never replaces; a name that begins with `.pitr-tmp-` is unfinished and no object; the root is
never created, because an absent mount must not look like an empty repository.

User metadata is not kept. A name cannot be both an object and a folder ("a" and "a/b"), as it can on S3.
"""

import errno
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from agent.errors import RepositoryError, RepositoryRefused, RepositoryUnavailable
from agent.ports import Body, DeletedVersion, Deletion, ObjectInfo, OpenObject, StoredObject
from agent.tasks import in_thread

_T = TypeVar("_T")
_PIECE_BYTES = 1 << 20
_ENTRIES_PER_STEP = 1000
_UNFINISHED = ".pitr-tmp-"
_ABANDONED_SECONDS = 86_400
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PERMANENT = frozenset({
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS,
})  # fmt: skip


class DirectoryObjectStore:
    """The files below the directory `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable: set[Path] = set()  # folders

    async def put_if_absent(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - a file has none
    ) -> bool:
        """As `ObjectStore`."""
        return await self._run("store", key, partial(self._write, key, body, _link))

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - a file has none
    ) -> None:
        """As `ObjectStore`."""
        await self._run("store", key, partial(self._write, key, body, _rename))

    async def put_stream(
        self,
        key: str,
        chunks: AsyncIterator[Body],
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - a file has none
    ) -> int:
        """As `ObjectStore`."""
        return (await self._write_stream(key, chunks, _rename))[0]

    async def put_stream_if_absent(
        self,
        key: str,
        chunks: AsyncIterator[Body],
        *,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - a file has none
    ) -> int | None:
        """As `ObjectStore`."""
        size, placed = await self._write_stream(key, chunks, _link)
        return size if placed else None

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        async with self._opened(key) as file:
            return None if file is None else _info(key, os.fstat(file.fileno()))

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        async with self._opened(key) as file:
            if file is None:
                return None
            body = await self._run("read", key, file.read)
            return StoredObject(_info(key, os.fstat(file.fileno())), body)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`."""
        async with self._opened(key) as file:
            yield None if file is None else OpenObject(_info(key, os.fstat(file.fileno())), self._pieces(key, file))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        objects = self._walk("", prefix, after)
        while batch := await self._run("list", prefix, lambda: [*islice(objects, _ENTRIES_PER_STEP)]):
            for info in batch:
                yield info

    async def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        for info in await self._run("list", folder, lambda: [*self._files(folder)]):
            yield info

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`."""
        (await self.delete_many(keys)).raise_first()

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`."""
        return await self._run("delete", keys[0], partial(self._remove, keys)) if keys else Deletion()

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """As `ObjectStore`."""
        await self._run("list", prefix, partial(os.listdir, self._root))
        return {}

    async def check(self) -> None:
        """As `ObjectStore`."""
        await self._run("list", "", partial(os.listdir, self._root))

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        await self.check()
        return datetime.now(UTC)

    async def close(self) -> None:
        """As `ObjectStore`."""

    async def _run(
        self, verb: str, key: str, work: Callable[[], _T], *, undo: Callable[[_T], None] = lambda _: None
    ) -> _T:
        """Return what `work` returns in a thread; `undo` as of `in_thread`."""
        try:
            return await in_thread(work, undo=undo)
        except OSError as error:
            raise self._translate(verb, key, error) from error

    def _translate(self, verb: str, key: str, error: OSError) -> RepositoryError:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not self._root.is_dir():
            return RepositoryRefused(
                f"repository directory {self._root} does not exist",
                hint="Mount or create it, or correct WALG_FILE_PREFIX.",
            )
        message = f"cannot {verb} {self._root / key}: {error.strerror or error}"
        if error.errno in _PERMANENT:
            return RepositoryRefused(message, hint="Correct WALG_FILE_PREFIX or the permissions below it.")
        return RepositoryUnavailable(message, hint="Check the file system that holds WALG_FILE_PREFIX.")

    def _path(self, key: str) -> Path:
        names = key.split("/")
        if "\0" in key or any(name in ("", ".", "..") or name.startswith(_UNFINISHED) for name in names):
            raise RepositoryRefused(f"object name {key!r} cannot be a file name")
        return self._root.joinpath(*names)

    def _make_folder(self, folder: Path) -> None:
        """Make `folder` and what lies between it and the root, durably.

        Whoever made one that is there already may have been killed before it was durable, or be about to make it so.
        """
        if folder in self._durable and folder.is_dir():
            return
        if folder != self._root:
            self._make_folder(folder.parent)
            with suppress(FileExistsError):
                folder.mkdir()
            _sync_directory(folder.parent)
        _sweep(folder)
        self._durable.add(folder)

    def _unfinished(self, key: str) -> "_UnfinishedFile":
        path = self._path(key)
        self._make_folder(path.parent)
        return _UnfinishedFile(path)

    def _write(self, key: str, body: Body, place: Callable[[Path, Path], bool]) -> bool:
        file = self._unfinished(key)
        try:
            file.write(body)
            return file.publish(place)
        finally:
            file.discard()

    async def _write_stream(
        self, key: str, chunks: AsyncIterator[Body], place: Callable[[Path, Path], bool]
    ) -> tuple[int, bool]:
        """Write a file and give it its name by `place`; return its size, and what `place` says."""
        file = await self._run("store", key, partial(self._unfinished, key), undo=_UnfinishedFile.discard)
        try:
            async for chunk in chunks:
                await self._run("store", key, partial(file.write, chunk))
            placed = await self._run("store", key, partial(file.publish, place))
        finally:
            await self._run("store", key, file.discard)
        return file.size, placed

    @asynccontextmanager
    async def _opened(self, key: str) -> AsyncIterator[BinaryIO | None]:
        file = await self._run("read", key, partial(self._open, key), undo=_close)
        try:
            yield file
        finally:
            _close(file)

    def _open(self, key: str) -> BinaryIO | None:
        try:
            return self._path(key).open("rb", buffering=0)
        except _NOT_THERE:
            self._demand_root()
            return None

    def _demand_root(self) -> None:
        """Raise unless the root is there, so that what was not found is known to be absent."""
        self._root.stat()

    async def _pieces(self, key: str, file: BinaryIO) -> AsyncIterator[bytes]:
        while piece := await self._run("read", key, partial(file.read, _PIECE_BYTES)):
            yield piece

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
        """Yield the objects in and below `folder` in key order."""
        for name in self._names(folder):
            key = folder + name
            if not name.endswith("/"):
                if key.startswith(prefix) and key > after:
                    yield from self._described(key)
            elif (key.startswith(prefix) or prefix.startswith(key)) and (key > after or after.startswith(key)):
                yield from self._walk(key, prefix, after)

    def _files(self, folder: str) -> Iterator[ObjectInfo]:
        for name in self._names(folder):
            if not name.endswith("/"):
                yield from self._described(folder + name)

    def _names(self, folder: str) -> Sequence[str]:
        """Return what is in `folder`, sorted as keys are: a folder below it by its name with the slash."""
        try:
            with os.scandir(self._root / folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(_UNFINISHED)]
        except _NOT_THERE:
            self._demand_root()
            return []
        return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in found)

    def _described(self, key: str) -> Iterator[ObjectInfo]:
        with suppress(FileNotFoundError):  # deleted meanwhile
            yield _info(key, self._path(key).stat())

    def _remove(self, keys: Sequence[str]) -> Deletion:
        self._demand_root()
        folders: set[Path] = set()
        failed: dict[str, RepositoryError] = {}
        for key in keys:
            path = self._path(key)
            try:
                path.unlink()
                folders.add(path.parent)
            except _NOT_THERE:
                pass
            except OSError as error:
                failed[key] = self._translate("delete", key, error)
        for folder in folders:
            _sync_directory(folder)  # what is removed next may not be gone before these
        return Deletion(failed)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; nobody writes to a file of that age any more."""
    before = time.time() - _ABANDONED_SECONDS
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process sweeps, or finished it
            if path.stat().st_mtime < before:
                path.unlink()


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()


class _UnfinishedFile:
    """A file on its way to the name `path`, which lies in an existing folder."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._temporary = path.with_name(_UNFINISHED + secrets.token_hex(8))
        self._file = self._temporary.open("xb")

    def write(self, chunk: Body) -> None:
        """Append `chunk`."""
        self.size += self._file.write(chunk)

    def publish(self, place: Callable[[Path, Path], bool]) -> bool:
        """Make the file durable under its name, by `place`; return what that says."""
        self._file.flush()
        os.fsync(self._file.fileno())
        placed = place(self._temporary, self._path)
        _sync_directory(self._path.parent)
        return placed

    def discard(self) -> None:
        """Close the file and remove its temporary name."""
        with suppress(OSError):  # what could not be written was reported when it was written
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that exists."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return path.samefile(temporary)  # NFS repeats a link whose answer was lost
    return True


def _rename(temporary: Path, path: Path) -> bool:
    """Give the file its name, replacing what has it."""
    temporary.replace(path)
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
