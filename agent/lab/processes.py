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
