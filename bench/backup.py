"""Takes full base backups through the agent, beside floors, and tells what they cost a pgbench running meanwhile.

    make bench-backup                                   # 300 MiB of pgbench, 2000 small tables, 3 rounds
    make bench-backup ARGS="--mib 3000 --tables 5000"   # 20 000 files of small tables, as peers were measured

Floors, in the same round: `tar | lz4 -1` and `tar | zstd -1` of the same directory to local disk. Compare rows of one
round by their ratio to the lz4 floor: the speed of a machine changes from hour to hour. CPU counts the agent and the
`pitr` command; PostgreSQL and the S3 server have their own columns. Memory is the agent's: before, and at its peak.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.demo_stage import Stage
from agent.lab.privileges import make_temporary_directory, unprivileged

_MIB = 1 << 20
_MIB_OF_A_SCALE = 15.0  # what pgbench makes of one
_FLOORS = {"lz4": "lz4 -1 -q -c", "zstd": "zstd -1 -q -c"}
_FLOOR = "tar --exclude=pg_wal -cf - -C {data} . | {codec} > {out}"


@dataclass(frozen=True)
class Row:
    """One backup: times in seconds, sizes in MiB."""

    work: str
    how: str
    wall: float
    cpu: float
    postgres_cpu: float
    s3_cpu: float
    stored_mib: float
    idle_mib: float
    peak_mib: float


@dataclass(frozen=True)
class Load:
    """What pgbench got done: transactions a second, and how long they took in milliseconds."""

    work: str
    tps: float
    p50: float
    p99: float


class Bench:
    """A server with its agent, and what is measured of them."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._pgbench = stage.binaries["postgres"].with_name("pgbench")

    def fill_pgbench(self, mib: int) -> None:
        """Make the tables of pgbench, of about `mib` MiB."""
        self._run_pgbench("-i", "-q", "-s", str(max(1, round(mib / _MIB_OF_A_SCALE))))

    def fill_tables(self, count: int) -> None:
        """Make `count` small tables, each with an index and a TOAST table: four files."""
        for start in range(0, count, 500):
            self._stage.source.execute(
                *(
                    f"CREATE TABLE small_{number} AS SELECT i AS id, 'row ' || i AS t FROM generate_series(1, 20) i; "
                    f"ALTER TABLE small_{number} ADD PRIMARY KEY (id)"
                    for number in range(start, min(start + 500, count))
                )
            )

    def run_transactions(self, count: int) -> None:
        """Run so many transactions of pgbench."""
        self._run_pgbench("-n", "-c", "4", "-j", "1", "-t", str(count // 4))

    def settle(self) -> None:
        """Let the server write what it has to, so that no backup waits for that."""
        self._stage.source.execute("VACUUM ANALYZE", "CHECKPOINT")
        self._stage.source.wait_until_archived(self._stage.source.switch_wal())

    def floor(self, work: str, codec: str) -> Row:
        """Measure `tar` with `codec` to local disk."""
        out = self._stage.directory / "floor"
        command = _FLOOR.format(data=self._stage.source.data_directory, codec=_FLOORS[codec], out=out)
        started, used = time.perf_counter(), _children_cpu()
        subprocess.run(["/bin/sh", "-c", command], check=True)
        row = Row(
            work, f"tar | {codec} -1", time.perf_counter() - started, _children_cpu() - used,
            0, 0, out.stat().st_size / _MIB, 0, 0,
        )  # fmt: skip
        out.unlink()
        return row

    def backup(self, work: str, codec: str) -> Row:
        """Measure `pitr backup now`."""
        with self._agent(codec) as agent:
            idle = _memory(agent, "VmRSS")
            Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # VmHWM begins anew
            others = [psutil.Process(pid) for pid in (self._stage.source.pid, self._stage.s3.pid)]
            before = [_children_cpu(), _cpu(agent), *map(cpu_of_all, others)]
            started = time.perf_counter()
            self.back_up()
            wall = time.perf_counter() - started
            after = [_children_cpu(), _cpu(agent), *map(cpu_of_all, others)]
            called, agents, postgres, s3 = (b - a for a, b in zip(before, after, strict=True))
            stored = self._stage.agent.metric("pitr_backup_stored_bytes") / _MIB
            return Row(
                work, f"pitr {codec}", wall, called + agents, postgres, s3, stored, idle, _memory(agent, "VmHWM")
            )

    def back_up(self) -> None:
        """Take a full base backup."""
        subprocess.run(
            pitr_command("backup", "now", "--json"), env=agent_environment(self._stage.agent.settings), check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def load(self, seconds: int, codec: str) -> list[Load]:
        """Measure pgbench alone and with backups one after the other."""
        rows = [self._load("pgbench alone", seconds)]
        with self._agent(codec):
            enough = threading.Event()

            def back_up() -> None:
                while not enough.is_set():
                    self.back_up()

            thread = threading.Thread(target=back_up)
            thread.start()
            rows.append(self._load(f"pgbench with backups ({codec})", seconds))
            enough.set()
            thread.join()
        return rows

    def _load(self, work: str, seconds: int) -> Load:
        logs = Path(self._stage.directory) / "transactions"
        logs.mkdir(mode=0o777)
        logs.chmod(0o777)
        self._run_pgbench("-n", "-c", "4", "-j", "1", "-T", str(seconds), "-l", f"--log-prefix={logs}/log")
        took = sorted(int(line.split()[2]) / 1000 for path in logs.iterdir() for line in path.open())
        shutil.rmtree(logs)
        return Load(work, len(took) / seconds, statistics.median(took), took[round(0.99 * (len(took) - 1))])

    def _run_pgbench(self, *arguments: str) -> None:
        environment = agent_environment(self._stage.source.client_environment)
        subprocess.run(
            unprivileged([self._pgbench, *arguments]), env=environment, cwd="/", check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @contextmanager
    def _agent(self, codec: str) -> Iterator[psutil.Process]:
        """A fresh agent, so that its memory is its own."""
        self._stage.agent.settings["WALG_COMPRESSION_METHOD"] = codec
        self._stage.agent.restart()
        assert self._stage.agent.pid is not None
        yield psutil.Process(self._stage.agent.pid)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_of_all(process: psutil.Process) -> float:
    """Return the CPU of a process, its children, and those of its children that have ended."""
    times = process.cpu_times()
    return _cpu(process) + float(times.children_user + times.children_system) + sum(map(_cpu, process.children()))


def _children_cpu() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def _memory(process: psutil.Process, field: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def rounds(bench: Bench, work: str, options: argparse.Namespace) -> list[Row]:
    """Measure the floors and the agent in alternation."""
    bench.settle()
    rows: list[Row] = []
    for _ in range(options.rounds):
        for codec in options.codec:
            rows += [bench.floor(work, codec), bench.backup(work, codec)]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the medians, each with its ratio to the lz4 floor of the same work."""
    result = Table()
    for heading in ("work", "how"):
        result.add_column(heading, no_wrap=True)
    for heading in ("s", "x floor", "CPU s", "x floor", "PG CPU s", "S3 CPU s", "stored MiB", "idle MiB", "peak MiB"):
        result.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.work, row.how), []).append(row)

    def middle(group: Sequence[Row], value: Callable[[Row], float]) -> float:
        return statistics.median(map(value, group))

    for (work, how), group in groups.items():
        floor = groups.get((work, "tar | lz4 -1"), group)
        wall, cpu = middle(group, lambda row: row.wall), middle(group, lambda row: row.cpu)
        result.add_row(
            work, how, f"{wall:.2f}", f"{wall / middle(floor, lambda row: row.wall):.2f}",
            f"{cpu:.2f}", f"{cpu / middle(floor, lambda row: row.cpu):.2f}",
            f"{middle(group, lambda row: row.postgres_cpu):.2f}", f"{middle(group, lambda row: row.s3_cpu):.2f}",
            f"{middle(group, lambda row: row.stored_mib):.0f}", f"{middle(group, lambda row: row.idle_mib):.0f}",
            f"{middle(group, lambda row: row.peak_mib):.0f}",
        )  # fmt: skip
    return result


def load_table(loads: Sequence[Load]) -> Table:
    """Return what pgbench got done, with and without backups."""
    result = Table()
    for heading in ("load", "TPS", "x alone", "p50 ms", "p99 ms"):
        result.add_column(heading, justify="left" if heading == "load" else "right", no_wrap=True)
    for load in loads:
        result.add_row(
            load.work, f"{load.tps:.0f}", f"{load.tps / loads[0].tps:.2f}", f"{load.p50:.2f}", f"{load.p99:.1f}"
        )
    return result


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of pgbench's tables")
    parser.add_argument("--tables", type=int, default=2000, help="small tables, four files each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-seconds", type=int, default=20, help="of pgbench, alone and with backups; 0: none")
    parser.add_argument("--codec", nargs="+", choices=list(_FLOORS), default=list(_FLOORS))
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args()
    stage = Stage(make_temporary_directory("pitr-bench-"))
    try:
        stage.start_s3()
        stage.initialise()
        stage.source.configure(
            shared_buffers="256MB", max_wal_size="8GB", autovacuum=False, max_locks_per_transaction=1000
        )
        stage.agent.start()
        stage.source.start()
        bench, loads = Bench(stage), list[Load]()
        bench.fill_pgbench(options.mib)
        rows = rounds(bench, f"{options.mib} MiB", options)
        if options.load_seconds:
            loads = bench.load(options.load_seconds, options.codec[-1])
        bench.fill_tables(options.tables)
        rows += rounds(bench, f"and {options.tables} small tables", options)
    finally:
        stage.end()
    if options.json is not None:
        values = [*map(asdict, rows), *map(asdict, loads)]
        options.json.write_text("".join(json.dumps(value) + "\n" for value in values))
    console = Console(width=160)
    console.print(table(rows))
    if loads:
        console.print(load_table(loads))


if __name__ == "__main__":
    main()
