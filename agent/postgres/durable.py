"""Files and directories that are whole or absent after a crash, never half.

Every function blocks for file I/O: call them in a thread. All raise `OSError`.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY_SUFFIX = ".pitr-new"


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
