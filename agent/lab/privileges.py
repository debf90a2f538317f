"""Running the lab without root's privileges, which PostgreSQL refuses to run with.

As root, everything the lab starts runs as the user `postgres`, or `nobody` where there is no such user; for any other
user nothing changes. Source: check_root() in PostgreSQL's main.c.
"""

import functools
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import agent
from agent.errors import ConfigError
from agent.lab import run_unprivileged

_USERS = ("postgres", "nobody")
_LONGEST_BASE = 40  # leaves room for a socket's name below it: a socket's path has at most 107 bytes, unix(7)


@functools.cache
def unprivileged_user() -> pwd.struct_passwd | None:
    """Return the user that the lab's processes run as, or None if this process is not root and changes nothing.

    Raises:
        ConfigError: This process is root and the system has neither of the users.
    """
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = next((known[name] for name in _USERS if name in known), None)
    if user is None:
        raise ConfigError(
            "PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as",
            hint="Run this as an ordinary user, or add one: useradd --system postgres.",
        )
    return user


def unprivileged(command: Sequence[str | Path], *, needs: Sequence[Path] = ()) -> list[str]:
    """Return the command line that runs `command` as `unprivileged_user()`, with HOME and TMPDIR that it may use.

    `command[0]` (found on PATH) and this installation may lie below a directory that the user may not enter; `needs`
    names further files, programs and directories that must be usable all the same. The process keeps the pid that it is
    started with, so it can be started, watched and killed like `command` itself.

    Raises:
        ConfigError: `command[0]` is not on PATH, or as `unprivileged_user`.
    """
    user = unprivileged_user()
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError(f"cannot find the program {command[0]}", hint="Install it, or name it with its directory.")
    run = [str(Path(program).absolute()), *map(str, command[1:])]  # absolute() keeps the link that makes it a venv's
    if user is None:
        return run
    launcher = [sys.executable, "-I", "-S", run_unprivileged.__file__, user.pw_name]
    return [*launcher, *map(str, [*_own_paths(Path(program)), *needs]), "--", *run]


def _own_paths(program: Path) -> Iterator[Path]:
    """Yield what `program` needs of this installation: its programs and hooks, this package, for Python its library."""
    yield from (Path(sys.prefix), Path(agent.__file__))
    if program.samefile(sys.executable):
        yield from (Path(sys.base_prefix), Path.cwd())


def restart_unprivileged(*, needs: Sequence[Path] = ()) -> None:
    """As root, replace this process by itself run as `unprivileged_user()`; else return at once.

    Raises:
        ConfigError: As `unprivileged_user`.
    """
    if unprivileged_user() is None:
        return
    command = unprivileged([sys.executable, *sys.orig_argv[1:]], needs=needs)
    os.execv(command[0], command)  # noqa: S606 - an argument list, no shell


def hand_over(path: Path) -> None:
    """As root, give `path` and all below it to `unprivileged_user()`; else do nothing. Links are not followed."""
    user = unprivileged_user()
    if user is None:
        return
    for entry in (path, *path.rglob("*")):
        os.lchown(entry, user.pw_uid, user.pw_gid)


def make_directory(path: Path) -> None:
    """Make the directory `path`, mode 0700, belonging to `unprivileged_user()`, unless it exists."""
    if not path.exists():
        path.mkdir(mode=0o700)
        hand_over(path)


def make_temporary_directory(prefix: str) -> Path:
    """Make an empty directory, mode 0700, belonging to `unprivileged_user()`; return its path.

    The path is short enough for unix sockets below it: TMPDIR is used if it is, else /tmp.
    """
    base = tempfile.gettempdir()
    short = base if len(base) <= _LONGEST_BASE else "/tmp"  # noqa: S108 - mkdtemp makes a fresh name
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=short))
    hand_over(directory)
    return directory
