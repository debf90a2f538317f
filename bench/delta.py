"""Takes deltas through the agent after a share of the pages changed: by reading all pages, and by WAL summaries.

    make bench-delta                                   # 300 MiB of pgbench, 5 % changed, 3 rounds
    make bench-delta ARGS="--mib 3000"

All build on one full backup; each has the same changes to store. Needs PostgreSQL 17 or later, as the
embedded one is. CPU counts the agent and the `pitr` command, memory the agent: before, and at its peak.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.demo_stage import Stage
from agent.lab.privileges import make_temporary_directory, unprivileged
from agent.lab.waiting import wait_until

_MIB = 1 << 20
_MIB_OF_A_SCALE = 15.0  # what pgbench makes of one


@dataclass(frozen=True)
class Row:
    """One backup: times in seconds, sizes in MiB."""

    how: str
    wall: float
    cpu: float
    read_mib: float
    stored_mib: float
    idle_mib: float
    peak_mib: float


class Bench:
    """A server with its agent, and what is measured of them."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def fill(self, mib: int) -> None:
        """Make the tables of pgbench, of about `mib` MiB."""
        pgbench = self._stage.binaries["postgres"].with_name("pgbench")
        subprocess.run(
            unprivileged([pgbench, "-i", "-q", "-s", str(max(1, round(mib / _MIB_OF_A_SCALE)))]),
            env=agent_environment(self._stage.source.client_environment), cwd="/", check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._stage.source.execute("VACUUM ANALYZE", "CHECKPOINT")

    def change(self, percent: float) -> None:
        """Change rows in about `percent` of the pages, half of them where the new versions of the rows go."""
        last = f"(SELECT max(aid) * {percent / 200} FROM pgbench_accounts)"
        self._stage.source.execute(f"UPDATE pgbench_accounts SET abalance = 1 WHERE aid <= {last}", "CHECKPOINT")

    def summarize(self, on: bool) -> None:
        """Switch WAL summaries on or off."""
        setting = "on" if on else "off"
        self._stage.source.execute(f"ALTER SYSTEM SET summarize_wal = {setting}", "SELECT pg_reload_conf()")
        wait_until(
            lambda: self._stage.source.value("SHOW summarize_wal") == setting,
            seconds=30,
            what=f"summarize_wal {setting}",
        )

    def backup(self, how: str, *options: str, parent: str = "") -> tuple[str, Row]:
        """Measure `pitr backup now` with a fresh agent; return the backup's name too."""
        self._stage.agent.settings["WALG_DELTA_FROM_NAME"] = parent
        self._stage.agent.restart()
        assert self._stage.agent.pid is not None
        agent = psutil.Process(self._stage.agent.pid)
        idle = _memory(agent, "VmRSS")
        Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        used, started = _cpu(agent), time.perf_counter()
        told: dict[str, Any] = json.loads(
            subprocess.run(
                pitr_command("backup", "now", "--json", *options),
                env=agent_environment(self._stage.agent.settings), check=True, stdout=subprocess.PIPE,
            ).stdout
        )  # fmt: skip
        wall = time.perf_counter() - started
        read, stored = (self._stage.agent.metric(f"pitr_backup_{what}_bytes") / _MIB for what in ("read", "stored"))
        return told["backup"], Row(how, wall, _cpu(agent) - used, read, stored, idle, _memory(agent, "VmHWM"))


def _cpu(agent: psutil.Process) -> float:
    own, commands = agent.cpu_times(), psutil.Process().cpu_times()
    return float(own.user + own.system + commands.children_user + commands.children_system)


def _memory(process: psutil.Process, field: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def measure(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Take a full backup, change pages, take deltas: by WAL summaries first, for switching them off leaves a gap."""
    bench.summarize(on=True)
    bench.fill(options.mib)
    full, row = bench.backup("full", "--full")
    rows = [row]
    bench.change(options.percent)
    for how, on in (("delta, WAL summaries", True), ("delta, all pages read", False)):
        bench.summarize(on)
        rows += [bench.backup(how, "--delta", parent=full)[1] for _ in range(options.rounds)]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the medians."""
    result = Table()
    result.add_column("how", no_wrap=True)
    for heading in ("s", "CPU s", "read MiB", "stored MiB", "idle MiB", "peak MiB"):
        result.add_column(heading, justify="right", no_wrap=True)
    for how in dict.fromkeys(row.how for row in rows):
        columns = zip(*(list(asdict(row).values())[1:] for row in rows if row.how == how), strict=True)
        wall, cpu, *sizes = map(statistics.median, columns)
        result.add_row(how, f"{wall:.2f}", f"{cpu:.2f}", *(f"{size:.1f}" for size in sizes))
    return result


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of pgbench's tables")
    parser.add_argument("--percent", type=float, default=5, help="of the pages changed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    stage = Stage(make_temporary_directory("pitr-bench-"))
    try:
        stage.start_s3()
        stage.initialise()
        stage.source.configure(shared_buffers="256MB", max_wal_size="8GB", autovacuum=False)
        stage.agent.start()
        stage.source.start()
        rows = measure(Bench(stage), options)
    finally:
        stage.end()
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
