"""What processes have used, and a table of medians beside a floor: common to the benchmarks."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import struct_rusage
from typing import Any

import psutil
from rich.table import Table

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: seconds, and MiB; 0 is what does not apply. The first way of a work is its floor."""

    work: str
    how: str
    wall: float
    cpu: float = 0
    s3_cpu: float = 0
    read_mib: float = 0
    stored_mib: float = 0
    idle_mib: float = 0
    peak_mib: float = 0


_HEADINGS = {
    "wall": "s", "cpu": "CPU s", "s3_cpu": "S3 CPU s", "read_mib": "read MiB", "stored_mib": "stored MiB",
    "idle_mib": "idle MiB", "peak_mib": "peak MiB",
}  # fmt: skip
_COMPARED = ("wall", "cpu")


def cpu_of(process: psutil.Process) -> float:
    """Return the CPU seconds of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_of_all(process: psutil.Process) -> float:
    """Return the CPU seconds of a process, its children, and those of its children that have ended."""
    times = process.cpu_times()
    return cpu_of(process) + float(times.children_user + times.children_system) + sum(map(cpu_of, process.children()))


def cpu_of_ended_children() -> float:
    """Return the CPU seconds of all that this process has started and waited for."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def wait_until_idle(process: psutil.Process) -> None:
    """Return once a process has used 2 % of a processor at most for a second: what it does at its start is done."""
    before = cpu_of(process)
    while True:
        time.sleep(1)
        now = cpu_of(process)
        if now - before <= 0.02:
            return
        before = now


def memory_mib(process: psutil.Process, field: str) -> float:
    """Return the memory of a process: `VmRSS`, what is resident, or `VmHWM`, the most that was."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> struct_rusage:
    """Run `command` to its end; return what it and all it waited for have used. Raises `RuntimeError` if it fails."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        complaints = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} exited with {process.returncode}: {complaints.decode()[-500:]}")
    return used


def table(rows: Sequence[Row]) -> Table:
    """Return the medians, with ratios of time and CPU to the floor; what no row has anything of is left out."""
    names = [name for name in _HEADINGS if any(getattr(row, name) for row in rows)]
    result = Table()
    for heading in ("work", "how"):
        result.add_column(heading, no_wrap=True)
    for name in names:
        for heading in (_HEADINGS[name], *["x floor"] * (name in _COMPARED)):
            result.add_column(heading, justify="right", no_wrap=True)
    medians: dict[tuple[str, str], dict[str, float]] = {}
    for work, how in dict.fromkeys((row.work, row.how) for row in rows):
        group = [row for row in rows if (row.work, row.how) == (work, how)]
        medians[work, how] = {name: statistics.median(getattr(row, name) for row in group) for name in names}
    for (work, how), values in medians.items():
        floor = next(of for (other, _), of in medians.items() if other == work)
        cells = []
        for name, value in values.items():
            cells.append("" if not value else f"{value:.0f}" if name.endswith("mib") else f"{value:.2f}")
            if name in _COMPARED:
                cells.append(f"{value / floor[name]:.2f}" if value and floor[name] else "")
        result.add_row(work, how, *cells)
    return result


def write_json(path: Path | None, rows: Sequence[Any]) -> None:
    """Write `rows`, dataclasses, to the file `path`, one a line, if it is given."""
    if path is not None:
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
