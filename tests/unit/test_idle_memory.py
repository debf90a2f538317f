"""The idle agent: what it has not loaded, tens of MiB and tenths of a second, and what it gives back."""

import asyncio
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from agent.budget import MemoryBudget
from agent.idle_memory import IdleMemory

ARCHIVING = "agent.cli.main, agent.cli.agent, agent.app, agent.storage.s3"
READING = "agent.cli.main, agent.cli.window, agent.cli.wal, agent.cli.expire, agent.cli.verify"
BACKING_UP = "agent.backup.taker, agent.backup.part_upload, agent.verify.content"
ASKING = "agent.cli.main, agent.cli.backup, agent.cli.backup_now, agent.cli.status"


@pytest.mark.parametrize(
    ("modules", "not_needed"),
    [
        (ARCHIVING, ["numpy", "psycopg", "boto3", "agent.lab", "agent.check", "agent.restore_mode"]),
        (
            READING,
            ["agent.app", "agent.server", "agent.archive", "agent.backup", "agent.restore", "aiohttp", "botocore"],
        ),
        (BACKING_UP, ["numpy"]),
        (ASKING, ["agent.app", "agent.repository", "agent.storage", "aiohttp.web", "structlog"]),
    ],
    ids=["the resident agent", "what reads a directory", "a full base backup, read back", "what asks it something"],
)
def test_what_something_else_needs_is_not_loaded(modules: str, not_needed: list[str]) -> None:
    program = f"import {modules}, sys; print([name for name in {not_needed} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


PROGRAM = """
import sys, threading
from agent.budget import give_back
from agent.idle_memory import use_one_arena

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) >> 8

if sys.argv[1] == "one":
    use_one_arena()
bytearray(16 << 20)  # freed at once, it teaches the library to keep as much in each arena
begun, barrier = resident(), threading.Barrier(4)

def work():
    barrier.wait()
    kept = [b"x" * 100_000 for _ in range(200)]
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
print(resident() - begun)
"""


def left_after_work(arenas: str) -> int:
    """Return how many MiB are left of 76 that four threads have used, given back."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, arenas], capture_output=True, check=True).stdout)


def test_what_work_used_is_given_back() -> None:
    assert left_after_work("one") < 10 < left_after_work("many")


class _Seconds:
    """Lets a given number of seconds pass at once."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.left -= seconds
        if self.left < 0:
            raise asyncio.CancelledError


@pytest.mark.parametrize(("used", "times"), [(0, 3), (1, 0)])
async def test_memory_is_given_back_while_nothing_works(used: int, times: int) -> None:
    given: list[None] = []
    budget = MemoryBudget(10)
    async with budget.reserve(used):
        with suppress(asyncio.CancelledError):
            await IdleMemory(budget, _Seconds(30), lambda: given.append(None)).run()
    assert len(given) == times
