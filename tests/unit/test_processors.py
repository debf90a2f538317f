"""Threads that compute are as many as processors may be used: of the machine, and of the container."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.processors import processors

USABLE = len(os.sched_getaffinity(0))


def written(directory: Path, files: dict[str, str]) -> Path:
    """Write the control group's files as Linux shows them."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize("limit", [0.01, 0.5, 1, 1.5, 2, 64])
def test_no_more_than_the_containers_limit_are_used(tmp_path: Path, limit: float) -> None:
    quota = round(limit * 100_000)
    first = written(tmp_path / "version 1", {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"})
    second = written(tmp_path / "version 2", {"cpu.max": f"{quota} 100000\n"})
    assert processors(first) == processors(second) == min(USABLE, math.ceil(limit))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000\n"},
        {"cpu.max": ""},
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        {"cpu/cpu.cfs_quota_us": "50000\n"},
    ],
)
def test_without_a_limit_all_are_used_that_the_process_may_run_on(tmp_path: Path, files: dict[str, str]) -> None:
    assert processors(written(tmp_path, files)) == USABLE


def test_only_those_are_used_that_the_process_may_run_on() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from agent.processors import processors; print(processors())"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"1\n"
