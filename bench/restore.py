"""Restores base backups beside floors: filling the directory, replaying WAL, and the time to the first query.

    make bench-restore                                   # 300 MiB of pgbench, 2000 small tables, 3 rounds
    make bench-restore ARGS="--mib 3000 --tables 5000"   # 20 000 files of small tables, as peers were measured

Floors, in the same round: `zstd -d | tar -x` (or lz4) of the same directory from local disk, which checks nothing and
makes nothing durable, the same with `sync -f` after it, and `cp -a`. Compare rows of one round by their ratio to the
tar floor: the speed of a machine changes from hour to hour. CPU is that of the command and all it starts (PostgreSQL,
in rows that replay); the S3 server has its own column. Memory is the peak of the `pitr` process.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.demo_stage import Stage
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_temporary_directory
from bench.backup import Bench, cpu_of_all

_MIB = 1 << 20
_TOOLS = {"lz4": ("lz4 -1 -q -c", "lz4 -d -q -c"), "zstd": ("zstd -1 -q -c", "zstd -d -q -c")}


@dataclass(frozen=True)
class Row:
    """One restore: times in seconds, memory in MiB."""

    work: str
    how: str
    wall: float
    cpu: float
    s3_cpu: float
    peak_mib: float


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> resource.struct_rusage:
    """Run `command` to its end; return what it and all it waited for have used. Raises `RuntimeError` if it fails."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        complaints = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} exited with {process.returncode}: {complaints.decode()[-500:]}")
    return used


def run_shell(command: str) -> resource.struct_rusage:
    """Run a pipeline; as `run`."""
    return run(["/bin/sh", "-c", command])


class RestoreBench:
    """A repository with one base backup and WAL after it, and the same directory as local files."""

    def __init__(self, stage: Stage, codec: str) -> None:
        self._stage = stage
        self._codec = codec
        self._tar = stage.directory / "floor.tar"
        self._copy = stage.directory / "copy"
        self._out = stage.directory / "out"

    def make_floors(self) -> None:
        """Keep the data directory as it is now, as a packed tar and as it is."""
        data, pack = self._stage.source.data_directory, _TOOLS[self._codec][0]
        for path in (self._copy, self._tar):
            self._remove(path)
        run_shell(f"tar --exclude=pg_wal -cf - -C {data} . | {pack} > {self._tar}")
        self._copy.mkdir()
        run_shell(f"tar --exclude=pg_wal -cf - -C {data} . | tar -xf - -C {self._copy}")

    def floor(self, work: str, how: str) -> Row:
        """Measure `tar`, `tar, synced` or `cp`."""
        unpack = f"{_TOOLS[self._codec][1]} {self._tar} | tar -xf - -C {self._out}"
        commands = {
            "tar": unpack,
            "tar, synced": f"{unpack} && sync -f {self._out}",
            "cp": f"cp -a {self._copy}/. {self._out}",
        }
        self._out.mkdir()
        row = self._measure(work, f"{self._codec} -d | tar" if how == "tar" else how, lambda: run_shell(commands[how]))
        self._put_aside()
        return row

    def hydrate(self, work: str) -> Row:
        """Measure `pitr restore` up to a directory that is ready to be started."""
        row = self._measure(work, "pitr hydrate", lambda: self._restore(AUTO_START="false", TARGET_IMMEDIATE="true"))
        self._put_aside()
        return row

    def replay(self, work: str) -> list[Row]:
        """Measure the whole restore to the end of the WAL, and the start of the restored server to its first answer."""
        binaries = self._stage.binaries
        restored = self._measure(work, "pitr hydrate, replay, promote", lambda: self._restore(AUTO_START="true"))
        with PostgresCluster(self._out, binaries) as cluster:

            def start() -> None:
                cluster.start()
                cluster.value("SELECT count(*) FROM pgbench_accounts WHERE aid < 1000")

            started = self._measure(work, "then start, first query", start)
            cluster.stop()
        self._put_aside()
        return [restored, started]

    def _restore(self, **target: str) -> resource.struct_rusage:
        here = {
            "PGDATA": str(self._out), "PITR_POSTGRES_BIN": str(self._stage.binaries.directory),
            "PITR_HOOK_DIR": str(self._stage.hooks), "PITR_SOCKET": str(self._stage.directory / "restore.sock"),
        }  # fmt: skip
        settings = {**self._stage.agent.settings, **here, **target}
        self._out.mkdir(mode=0o700)
        hand_over(self._out)
        return run(pitr_command("restore"), agent_environment(settings))

    def _measure(self, work: str, how: str, act: Callable[[], resource.struct_rusage | None]) -> Row:
        server = psutil.Process(self._stage.s3.pid)
        s3, began = cpu_of_all(server), time.perf_counter()
        used = act()
        wall = time.perf_counter() - began
        cpu, peak = (used.ru_utime + used.ru_stime, used.ru_maxrss / 1024) if used is not None else (0, 0)
        return Row(work, how, wall, cpu, cpu_of_all(server) - s3, peak)

    def _put_aside(self) -> None:
        """Empty what was restored; it is removed at the end.

        ext4 looks long for an inode where many were freed in the last minutes: the next restore would be slow.
        """
        for directory, _, names in os.walk(self._out):
            for name in names:
                os.truncate(Path(directory, name), 0)
        self._out.rename(self._out.with_name(f"out-{time.monotonic_ns()}"))

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def rounds(bench: RestoreBench, work: str, count: int) -> list[Row]:
    """Measure floors and restores in alternation."""
    rows: list[Row] = []
    for _ in range(count):
        rows += [bench.floor(work, how) for how in ("tar", "tar, synced", "cp")]
        rows += [bench.hydrate(work), *bench.replay(work)]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the medians, each with its ratio to the tar floor of the same work."""
    result = Table()
    for heading in ("work", "how"):
        result.add_column(heading, no_wrap=True)
    for heading in ("s", "x floor", "CPU s", "x floor", "S3 CPU s", "peak MiB"):
        result.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.work, row.how), []).append(row)

    def middle(group: Sequence[Row], value: Callable[[Row], float]) -> float:
        return statistics.median(map(value, group))

    for (work, how), group in groups.items():
        floor = next(rows for (of, name), rows in groups.items() if of == work and name.endswith("-d | tar"))
        wall, cpu = middle(group, lambda row: row.wall), middle(group, lambda row: row.cpu)
        result.add_row(
            work, how, f"{wall:.2f}", f"{wall / middle(floor, lambda row: row.wall):.2f}",
            f"{cpu:.2f}", f"{cpu / middle(floor, lambda row: row.cpu):.2f}",
            f"{middle(group, lambda row: row.s3_cpu):.2f}", f"{middle(group, lambda row: row.peak_mib):.0f}",
        )  # fmt: skip
    return result


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of pgbench's tables")
    parser.add_argument("--tables", type=int, default=2000, help="small tables, four files each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transactions", type=int, default=20000, help="of pgbench after the backup, to be replayed")
    parser.add_argument("--codec", choices=list(_TOOLS), default="zstd")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args()
    stage = Stage(make_temporary_directory("pitr-bench-"))
    rows: list[Row] = []
    try:
        stage.start_s3()
        stage.initialise()
        stage.source.configure(
            shared_buffers="256MB", max_wal_size="8GB", autovacuum=False, max_locks_per_transaction=1000
        )
        stage.agent.settings["WALG_COMPRESSION_METHOD"] = options.codec
        stage.agent.start()
        stage.source.start()
        source, bench = Bench(stage), RestoreBench(stage, options.codec)
        fills: dict[str, Callable[[], None]] = {
            f"{options.mib} MiB": partial(source.fill_pgbench, options.mib),
            f"and {options.tables} small tables": partial(source.fill_tables, options.tables),
        }
        for work, fill in fills.items():
            fill()
            source.settle()
            bench.make_floors()
            source.back_up()
            source.run_transactions(options.transactions)
            source.settle()
            rows += rounds(bench, work, options.rounds)
    finally:
        stage.end()
    if options.json is not None:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
