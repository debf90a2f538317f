"""A WAL file that is read while PostgreSQL may do anything to it but write to what it has marked `.ready`."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WalRefused

PIECE_BYTES = 1 << 20
"""What is read at once: it stays in the processor's cache while it is digested and compressed."""


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells one content of a WAL file from another without reading it."""

    inode: int
    size: int
    modified_ns: int

    @property
    def seen_elsewhere(self) -> str:
        """What another container sees of the same file, too: size and time of the last change, SIZE:SECONDS."""
        seconds, nanoseconds = divmod(self.modified_ns, 10**9)
        return f"{self.size}:{seconds}.{nanoseconds:09}"


def file_state(path: str | Path) -> FileState | None:
    """Describe the file at `path`, or return None if it is not there. A link is not followed."""
    try:
        return _state(os.lstat(path))
    except FileNotFoundError:
        return None


def _state(status: os.stat_result) -> FileState:
    return FileState(status.st_ino, status.st_size, status.st_mtime_ns)


class WalFile:
    """A WAL file held open. Every function blocks for file I/O; not for use by two threads at once."""

    def __init__(self, path: Path, descriptor: int, state: FileState) -> None:
        """Use `open_wal_file`."""
        self.name = path.name
        self.size = state.size
        self.state = state
        self._path = path
        self._descriptor = descriptor

    def part(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, fewer at the end of the file."""
        return os.pread(self._descriptor, end - begin, begin)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the content in pieces, each overwritten by the next.

        Raises:
            WalRefused: The file changed while it was read: none of it is to be used.
            OSError: It cannot be read.
        """
        buffer = memoryview(bytearray(PIECE_BYTES))
        offset = 0
        while count := os.preadv(self._descriptor, [buffer], offset):
            yield buffer[:count]
            offset += count
        # PostgreSQL recycles a segment by renaming it to a future name and overwriting it in place.
        if offset != self.size or file_state(self._path) != self.state:
            raise WalRefused(f'WAL file "{self.name}" changed while it was read')


@contextmanager
def open_wal_file(path: Path) -> Iterator[WalFile]:
    """Open the WAL file at `path`, without following a link; close it on leaving the context.

    Raises:
        WalRefused: It is absent, or not a regular file.
        OSError: It cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise WalRefused(
            f'WAL file "{path.name}" is not in {path.parent}',
            hint="Check that the agent's PGDATA is the data directory of the server that called.",
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WalRefused(f'WAL file "{path.name}" is not a regular file')
        yield WalFile(path, descriptor, _state(status))
    finally:
        os.close(descriptor)
