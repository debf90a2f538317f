"""Restores base backups beside floors: filling the directory, replaying WAL, and the time to the first query.

    make bench-restore                                   # 300 MiB of pgbench, 2000 small tables, 3 rounds
    make bench-restore ARGS="--mib 3000 --tables 5000"   # 20 000 files of small tables, as peers were measured
    make bench-restore ARGS="--mib 3000 --tables 50000"

Floors, in the same round: `zstd -d | tar -x` (or lz4) of the same directory from local disk, which checks nothing and
makes nothing durable, and the same with `sync -f` after it. Compare rows of one round by their ratio to the first: the
speed of a machine changes from hour to hour. CPU is that of the command and all it starts (PostgreSQL, in rows that
replay); the S3 server has its own column. Memory is the peak of the `pitr` process.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from resource import struct_rusage

import psutil
from rich.console import Console

from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from bench.cluster import CODECS, MeasuredCluster, arguments_of, measured_cluster
from bench.measuring import Row, cpu_of_all, run, table, write_json


class Restores:
    """Restores of what is in the repository, beside the same directory as a local tar."""

    def __init__(self, cluster: MeasuredCluster, codec: str) -> None:
        """Keep the data directory as it is now, as a packed tar."""
        self._stage = cluster.stage
        self._codec = codec
        self._tar = cluster.stage.directory / "floor.tar"
        self._out = cluster.stage.directory / "out"
        data = cluster.stage.source.data_directory
        _run_shell(f"tar --exclude=pg_wal -cf - -C {data} . | {codec} -1 -q -c > {self._tar}")

    def floor(self, work: str, *, synced: bool = False) -> Row:
        """Measure `tar`, with `synced` and what makes its files durable."""
        how = f"{self._codec} -d | tar"
        unpack = f"{self._codec} -d -q -c {self._tar} | tar -xf - -C {self._out}"
        self._out.mkdir()
        if synced:
            how, unpack = f"{how}, synced", f"{unpack} && sync -f {self._out}"
        row = self._measure(work, how, lambda: _run_shell(unpack))
        self._put_aside()
        return replace(row, peak_mib=0)

    def hydrate(self, work: str) -> Row:
        """Measure `pitr restore` up to a directory that is ready to be started."""

        def act() -> struct_rusage:
            return self._restore(AUTO_START="false", TARGET_IMMEDIATE="true")

        row = self._measure(work, "pitr hydrate", act)
        self._put_aside()
        return row

    def until_first_query(self, work: str) -> list[Row]:
        """Measure the whole restore to the end of the WAL, and the start of the restored server to its first answer."""
        restored = self._measure(work, "pitr hydrate, replay, promote", lambda: self._restore(AUTO_START="true"))
        with PostgresCluster(self._out, self._stage.binaries) as cluster:

            def start() -> None:
                cluster.start()
                cluster.value("SELECT count(*) FROM pgbench_accounts WHERE aid < 1000")

            started = self._measure(work, "", start)
            cluster.stop()
        self._put_aside()
        return [restored, Row(work, "and to the first query", restored.wall + started.wall)]

    def _restore(self, **target: str) -> struct_rusage:
        here = {
            "PGDATA": str(self._out), "PITR_POSTGRES_BIN": str(self._stage.binaries.directory),
            "PITR_HOOK_DIR": str(self._stage.hooks), "PITR_SOCKET": str(self._stage.directory / "restore.sock"),
        }  # fmt: skip
        settings = {**self._stage.agent.settings, **here, **target}
        self._out.mkdir(mode=0o700)
        hand_over(self._out)
        return run(pitr_command("restore"), agent_environment(settings))

    def _measure(self, work: str, how: str, act: Callable[[], struct_rusage | None]) -> Row:
        server = psutil.Process(self._stage.s3.pid)
        s3, began = cpu_of_all(server), time.perf_counter()
        used = act()
        wall = time.perf_counter() - began
        cpu, peak = (used.ru_utime + used.ru_stime, used.ru_maxrss / 1024) if used is not None else (0, 0)
        return Row(work, how, wall, cpu, cpu_of_all(server) - s3, peak_mib=peak)

    def _put_aside(self) -> None:
        """Empty what was restored; it is removed at the end.

        ext4 looks long for an inode where many were freed in the last minutes: the next restore would be slow.
        """
        for directory, _, names in os.walk(self._out):
            for name in names:
                os.truncate(Path(directory, name), 0)
        self._out.rename(self._out.with_name(f"out-{time.monotonic_ns()}"))


def _run_shell(command: str) -> struct_rusage:
    return run(["/bin/sh", "-c", command])


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = arguments_of(__doc__)
    parser.add_argument("--tables", type=int, default=2000, help="small tables, four files each")
    parser.add_argument("--transactions", type=int, default=20000, help="of pgbench after the backup, to be replayed")
    parser.add_argument("--codec", choices=CODECS, default="zstd")
    options = parser.parse_args()
    rows: list[Row] = []
    with measured_cluster() as cluster:
        cluster.restart_agent(WALG_COMPRESSION_METHOD=options.codec)
        for work in cluster.filled(options):
            restores = Restores(cluster, options.codec)
            cluster.back_up("--full")
            cluster.pgbench("-n", "-c", "4", "-j", "1", "-t", str(options.transactions // 4))
            cluster.settle()
            for _ in range(options.rounds):
                rows += [restores.floor(work), restores.floor(work, synced=True)]
                rows += [restores.hydrate(work), *restores.until_first_query(work)]
    write_json(options.json, rows)
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
