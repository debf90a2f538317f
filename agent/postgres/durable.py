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
    failed writes since Linux 5.8, and it is believed of file systems that are the kernel's own.
    """

    def __init__(self) -> None:
        self._volumes: dict[int, Path] = {}
        self._files: list[Path] = []
        self._directories: set[Path] = set()

    def add(self, path: Path, descriptor: int) -> None:
        """Add the file at `path`, written, open as `descriptor`."""
        device = os.fstat(descriptor).st_dev
        if _can_sync_whole(device):
            self._volumes.setdefault(device, path.parent)
            return
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # begins to write it: the fsync waits less
        self._files.append(path)
        self._directories.add(path.parent)
        if len(self._files) >= _MOST_WAITING:
            self._sync_files()

    def add_directory(self, path: Path) -> None:
        """Add the names in the directory `path`."""
        device = path.stat().st_dev
        if _can_sync_whole(device):
            self._volumes.setdefault(device, path)
        else:
            self._directories.add(path)

    def sync(self) -> None:
        """Return when everything that was added is durable."""
        self._sync_files()
        for directory in self._directories:
            fsync_directory(directory)
        for directory in self._volumes.values():
            _sync_volume(directory)

    def _sync_files(self) -> None:
        for path in self._files:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._files.clear()


def _sync_volume(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc().syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(descriptor)


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
