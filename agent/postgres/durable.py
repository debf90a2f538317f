"""Files and directories that are whole or absent after a crash, never half.

Every function blocks for file I/O: call them in a thread. All raise `OSError`.
"""

import ctypes
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_TEMPORARY_SUFFIX = ".pitr-new"
_MOST_WAITING = 1000  # files, until they are made durable
_TELLS_OF_FAILURES = (5, 8)
_LARGE_BYTES = 1 << 20  # smaller files are better written many at a time
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_KERNEL_FILE_SYSTEMS = frozenset({"ext4", "xfs", "tmpfs"})


def fsync_directory(path: Path) -> None:
    """Make the names in the directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Put a file of `content` and `mode` at `path`, replacing what is there in one step; durable on return.

    A crash leaves the old file or the new one, and perhaps a file with the suffix `.pitr-new` beside it, which the
    next call overwrites.
    """
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.rename(path)
    fsync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove the file `path` if it exists; durable on return."""
    path.unlink(missing_ok=True)
    fsync_directory(path.parent)


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Hold the directory `path` for this process alone, inside the context; the kernel lets go when the process dies.

    Raises:
        BlockingIOError: Another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class Durability:
    """Makes many files durable: a volume at once where that can be trusted, else file by file.

    An fsync for each of 2000 small files takes seconds, `syncfs` tenths: it commits the journal once. It tells of
    failed writes since Linux 5.8, and it is believed of file systems that are the kernel's own. A failure is told once
    to whoever had the volume open by then, so it is opened before it is written to; `close` in the end.
    """

    def __init__(self) -> None:
        self._volumes: dict[int, tuple[int, str]] = {}  # by device: an open directory on it, and its path
        self._is_synced_whole: dict[str, bool] = {}  # by directory
        self._files: list[str] = []

    def begin(self, path: str) -> None:
        """Prepare for the file at `path`, which is there: call it before the first write."""
        self._add_directory(os.path.dirname(path))  # noqa: PTH120 - pathlib takes longer than the file

    def add(self, path: str, descriptor: int) -> None:
        """Add the file at `path`, begun and written, open as `descriptor`."""
        if self._add_directory(os.path.dirname(path)):  # noqa: PTH120 - as above
            if os.fstat(descriptor).st_size >= _LARGE_BYTES:  # begins to write it: the sync waits less
                _libc().sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
            return
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # begins to write it: the fsync waits less
        self._files.append(path)
        if len(self._files) >= _MOST_WAITING:
            self._sync_files()

    def add_directory(self, path: Path) -> None:
        """Add the names in the directory `path`."""
        self._add_directory(str(path))

    def _add_directory(self, path: str) -> bool:
        """Add the names in `path`; tell whether all that is in it is made durable with its volume."""
        is_synced_whole = self._is_synced_whole.get(path)
        if is_synced_whole is None:
            device = os.stat(path).st_dev  # noqa: PTH116 - as above
            is_synced_whole = self._is_synced_whole[path] = _can_sync_whole(device)
            if is_synced_whole and device not in self._volumes:
                self._volumes[device] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path
        return is_synced_whole

    def sync(self) -> None:
        """Return when everything that was added is durable."""
        self._sync_files()
        for directory, is_synced_whole in self._is_synced_whole.items():
            if not is_synced_whole:
                fsync_directory(Path(directory))
        for descriptor, directory in self._volumes.values():
            _sync_volume(descriptor, directory)

    def close(self) -> None:
        """Let go of the volumes; not while `sync` runs."""
        for descriptor, _ in self._volumes.values():
            os.close(descriptor)
        self._volumes.clear()

    def _sync_files(self) -> None:
        for path in self._files:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._files.clear()


def _sync_volume(descriptor: int, directory: str) -> None:
    if _libc().syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), directory)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def _can_sync_whole(device: int) -> bool:
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if release < _TELLS_OF_FAILURES or not hasattr(_libc(), "syncfs"):
        return False
    mounted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == mounted:
            return rest.split()[0] in _KERNEL_FILE_SYSTEMS
    return False
