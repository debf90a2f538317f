"""Looking at and ending process trees, by process id. Linux only, as is all of the lab. Source: proc(5)."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from agent.lab.waiting import wait_until

_GONE_SECONDS = 30


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below `pid`, parents before their children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    """Tell whether process `pid` runs; one that has ended and waits for its parent to notice does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End `process` and all processes below it by SIGKILL; return when they are gone. No error if it has ended.

    Raises:
        TimeoutError: One of them still runs.
    """
    if process.poll() is not None:
        return
    victims = [process.pid, *descendants(process.pid)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(_GONE_SECONDS)
    wait_until(lambda: not any(map(is_running, victims)), seconds=_GONE_SECONDS, what="killed processes to end")


def running_in(directory: Path) -> list[int]:
    """Return the ids of the processes whose working directory is `directory` or below it; PostgreSQL's is PGDATA."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(directory):
                found.append(int(entry.name))
    return found


def has_ended_in(data_directory: Path) -> bool:
    """Tell whether the next server can start in `data_directory`: none runs there, and a killed one is no zombie still.

    Source: CreateLockFile() in PostgreSQL's miscinit.c asks by kill(pid, 0), which a zombie answers.
    """
    if running_in(data_directory):
        return False
    try:
        os.kill(int((data_directory / "postmaster.pid").read_text().split("\n", 1)[0]), 0)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return False


def kill_all_in(directory: Path) -> None:
    """End by SIGKILL what runs in `directory`, though its parent may have died; return when it is gone.

    Raises:
        TimeoutError: One of them still runs.
    """
    victims = running_in(directory)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, victims)), seconds=_GONE_SECONDS, what="killed processes to end")
