"""Binds the agent's unix socket: one agent per socket, nothing stale left in the way."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import ConfigError

MAX_PATH_BYTES = 107  # sun_path without its terminating zero. Source: unix(7)
MODE = 0o660


def lock_of(path: Path) -> Path:
    """Return the lock file of the socket at `path`; it stays when the socket goes, for whoever comes next."""
    return path.with_name(path.name + ".lock")


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed agent left; whoever mistyped PITR_SOCKET keeps the file it names."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"PITR_SOCKET={path} exists and is no socket", hint="Choose a path that is free.")
    path.unlink()


@contextmanager
def bound_socket(path: Path) -> Iterator[socket.socket]:
    """Yield a listening socket at `path` with mode 0660; remove it afterwards.

    A lock beside the socket tells a running agent from the remains of a killed one.

    Raises:
        ConfigError: Another agent serves this socket, something else has its name, or it cannot be created there.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"PITR_SOCKET={path} is longer than {MAX_PATH_BYTES} bytes", hint="Choose a shorter path.")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock = os.open(lock_of(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the socket {path} cannot be created: {error.strerror}",
            hint="Mount a writable directory there, or set PITR_SOCKET.",
        ) from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_stale(path)
        listener.bind(str(path))
        path.chmod(MODE)
        listener.listen(128)
    except ConfigError:
        listener.close()
        os.close(lock)
        raise
    except OSError as error:
        listener.close()
        os.close(lock)
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise ConfigError(
                f"another agent serves {path}", hint="Stop it, or give this one another PITR_SOCKET."
            ) from error
        raise ConfigError(
            f"the socket {path} cannot be created: {error.strerror}", hint="Mount a writable directory there."
        ) from error
    try:
        yield listener
    finally:
        path.unlink(missing_ok=True)
        listener.close()
        os.close(lock)
