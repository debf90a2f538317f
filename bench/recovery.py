"""Lets a real PostgreSQL replay archived WAL: `restore_command` is the hook, and beside it `cp` from a local directory.

    make bench-recovery                              # 40 segments, 3 rounds, zstd and lz4 over TLS
    make bench-recovery ARGS="--segments 100 --codec zstd"

The same data directory and the same WAL for each, in alternation; compare by the ratio to `cp` of the same run. Most of
it is replay: what counts is that the next segment is there when it is asked for. Wall is from the server's start until
redo is done, and, with the checkpoint after it, until it takes connections, promoted. CPU is of the server and of the
hooks or `cp`, the agent's and the S3 server's besides. What is replayed is kept in --base for the next run.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import embedded_binaries
from agent.lab.privileges import hand_over, make_directory, make_temporary_directory, unprivileged
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from bench.cluster import certificate, over_tls
from bench.measuring import cpu_of, cpu_of_ended_children, memory_mib

_BUCKET = "bench"
_SCALE = 20
_FLOOR = "cp"
_KEPT = ("base", "wal")
_LONG_SECONDS = 1800
_PROMOTED = "database system is ready to accept connections"
_REDO_DONE = re.compile(r"^([0-9.]+) .*redo done at", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One recovery: times in seconds, memory in MiB."""

    how: str
    redo: float
    wall: float
    server_cpu: float
    agent_cpu: float
    s3_cpu: float
    idle_mib: float
    peak_mib: float


def kept_base(kept: Path, directory: Path, segments: int) -> int:
    """Let `directory` have what `make_base` makes, copied from `kept`, where it is made unless there is enough."""
    balance = kept / "balance"
    if balance.exists() and len(list((kept / "wal").glob("0*"))) >= segments:
        for name in _KEPT:
            shutil.copytree(kept / name, directory / name)
        hand_over(directory)
        return int(balance.read_text())
    made = make_base(directory, segments)
    shutil.rmtree(kept, ignore_errors=True)
    for name in _KEPT:
        shutil.copytree(directory / name, kept / name)
    balance.write_text(str(made))
    return made


def make_base(directory: Path, segments: int) -> int:
    """Make `directory`/base, a stopped server's data directory, and at least `segments` of WAL after it in /wal.

    Return what the tellers have in the end: every transaction changes it.
    """
    wal = directory / "wal"
    make_directory(wal)
    with PostgresCluster(directory / "source", embedded_binaries()) as cluster:
        cluster.initdb()
        cluster.configure(
            archive_mode="on", archive_command=f"cp %p {wal}/.%f && mv {wal}/.%f {wal}/%f", max_wal_size="8GB",
            shared_buffers="512MB", synchronous_commit="off", autovacuum=False,
        )  # fmt: skip
        cluster.start()
        cluster.run("pgbench", "-i", "-q", "-s", str(_SCALE), "postgres", seconds=_LONG_SECONDS)
        cluster.stop()
        shutil.copytree(cluster.data_directory, directory / "base")
        for path in wal.iterdir():
            path.unlink()
        cluster.start()
        while len(list(wal.glob("0*"))) < segments:
            pgbench = cluster.binaries["postgres"].with_name("pgbench")
            subprocess.run(
                unprivileged([pgbench, "-n", "-c", "8", "-j", "2", "-T", "2", "postgres"]),
                env=cluster.client_environment, cwd="/", check=True, capture_output=True,
            )  # fmt: skip
        balance = int(cluster.value("SELECT sum(tbalance) FROM pgbench_tellers"))
        cluster.wait_until_archived(cluster.switch_wal())
        cluster.stop()
    shutil.rmtree(cluster.data_directory)
    for path in (directory / "base" / "pg_wal").rglob("*"):
        if path.is_file():
            path.unlink()  # what is replayed comes from the archive
    return balance


class Recovery:
    """What is recovered, and from where."""

    def __init__(self, directory: Path, balance: int, server: SeaweedServer, pair: tuple[Path, Path] | None) -> None:
        self._directory = directory
        self._base = directory / "base"
        self._balance = balance
        self._server = server
        self._certificate = pair

    def archive(self, codec: str) -> None:
        """Fill the repository of this codec with the WAL, as archive_command does."""
        data = self._directory / "archived"
        shutil.copytree(self._base, data)
        for segment in (self._directory / "wal").glob("0*"):
            shutil.copy(segment, data / "pg_wal")
        hand_over(data)
        with AgentProcess(self._directory / "agent", self._settings(codec, data)) as agent:
            agent.start()
            for segment in sorted((self._directory / "wal").glob("0*")):
                hook = str(Path(sys.executable).parent / "wal-archive.sh")
                command = [hook, f"pg_wal/{segment.name}", segment.name]
                subprocess.run(command, cwd=data, env=agent.settings, check=True)
        shutil.rmtree(data)

    def floor(self) -> Row:
        """Recover with `cp`."""
        data = self._copied()
        return Row(_FLOOR, *self._recover(data, f"cp {self._directory}/wal/%f %p"), 0, 0, 0, 0)

    def through_agent(self, codec: str) -> Row:
        """Recover through the hook and a fresh agent."""
        data = self._copied()
        with AgentProcess(self._directory / "agent", self._settings(codec, data)) as agent:
            agent.start()
            process, server = psutil.Process(agent.pid), psutil.Process(self._server.pid)
            idle, used, served = memory_mib(process, "VmRSS"), cpu_of(process), cpu_of(server)
            hook = f"PITR_SOCKET={agent.socket} {Path(sys.executable).parent / 'wal-restore.sh'} %f %p"
            redo, wall, cpu = self._recover(data, hook)
            agent_cpu, s3_cpu = cpu_of(process) - used, cpu_of(server) - served
            return Row(f"agent, {codec}", redo, wall, cpu, agent_cpu, s3_cpu, idle, memory_mib(process, "VmHWM"))

    def _copied(self) -> Path:
        data = self._directory / "recovered"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(self._base, data)
        hand_over(data)
        return data

    def _recover(self, data: Path, restore_command: str) -> tuple[float, float, float]:
        """Return seconds: until redo was done, until the server was promoted, and of CPU, of it and its children."""
        (data / "recovery.signal").touch()
        hand_over(data)
        with PostgresCluster(data, embedded_binaries()) as cluster:
            cluster.configure(
                archive_mode="off", restore_command=restore_command, hot_standby=False, log_line_prefix="%n "
            )
            cluster.log_file.unlink(missing_ok=True)
            used, started = cpu_of_ended_children(), time.time()
            cluster.start(wait=False)
            wait_until(lambda: _PROMOTED in cluster.log_text(), seconds=_LONG_SECONDS, what="recovery to end")
            wall = time.time() - started
            done = _REDO_DONE.search(cluster.log_text())
            assert done is not None, "a promoted server has said so"
            if cluster.value("SELECT sum(tbalance) FROM pgbench_tellers") != self._balance:
                sys.exit(f"transactions were lost by {restore_command}: {cluster.log_tail()}")
            cluster.stop("immediate")
            return float(done[1]) - started, wall, cpu_of_ended_children() - used

    def _settings(self, codec: str, data: Path) -> dict[str, str]:
        return {
            **self._server.environment(_BUCKET, codec), **over_tls(self._server, self._certificate),
            "PGDATA": str(data), "WALG_COMPRESSION_METHOD": codec, "PITR_BACKUP_SCHEDULE": "",
        }  # fmt: skip


def table(rows: Sequence[Row], segments: int) -> Table:
    """Return the medians, per segment where it is work, with the ratio to `cp`."""
    result = Table(title=f"recovery of {segments} segments, per segment, medians", title_justify="left")
    for heading in (
        "how",
        "redo ms",
        "x cp",
        "promoted ms",
        "x cp",
        "CPU ms",
        "agent CPU ms",
        "S3 CPU ms",
        "idle MiB",
        "peak MiB",
    ):
        result.add_column(heading, justify="left" if heading == "how" else "right")
    middle: dict[str, list[float]] = {}
    for how in dict.fromkeys(row.how for row in rows):
        columns = zip(*(_numbers(row) for row in rows if row.how == how), strict=True)
        middle[how] = [statistics.median(column) for column in columns]
    for how, (redo, wall, server, agent, s3, idle, peak) in middle.items():
        redo_ms, wall_ms, *work = [f"{1000 * seconds / segments:.1f}" for seconds in (redo, wall, server, agent, s3)]
        ratios = [f"{seconds / floor:.2f}" for seconds, floor in zip((redo, wall), middle[_FLOOR], strict=False)]
        result.add_row(how, redo_ms, ratios[0], wall_ms, ratios[1], *work, f"{idle:.0f}", f"{peak:.0f}")
    return result


def _numbers(row: Row) -> tuple[float, ...]:
    return row.redo, row.wall, row.server_cpu, row.agent_cpu, row.s3_cpu, row.idle_mib, row.peak_mib


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", nargs="+", default=["zstd", "lz4"])
    parser.add_argument(
        "--base", type=Path, default=Path(".cache/bench/recovery"), help="where what is replayed is kept"
    )
    options = parser.parse_args()
    directory = make_temporary_directory("pitr-bench-")
    try:
        pair = certificate(directory)
        balance = kept_base(options.base.resolve(), directory, options.segments)
        segments = len(list((directory / "wal").glob("0*")))
        with SeaweedServer(directory / "s3", certificate=pair) as server:
            server.create_bucket(_BUCKET)
            recovery = Recovery(directory, balance, server, pair)
            for codec in options.codec:
                recovery.archive(codec)
            rows: list[Row] = []
            for _ in range(options.rounds):
                rows += [recovery.floor(), *map(recovery.through_agent, options.codec)]
    finally:
        shutil.rmtree(directory)
    Console(width=160).print(table(rows, segments))


if __name__ == "__main__":
    main()
