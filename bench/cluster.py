"""A server with its agent and an S3 server over TLS, of which base backups are taken and restored."""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from agent.lab.agent_process import agent_environment, run_pitr
from agent.lab.demo_stage import Stage
from agent.lab.privileges import make_temporary_directory
from agent.lab.seaweedfs import SeaweedServer
from bench.measuring import MIB, Row, cpu_of, cpu_of_all, cpu_of_ended_children, memory_mib, run, wait_until_idle

CODECS = ("lz4", "zstd")
_MIB_OF_A_SCALE = 15.0  # what pgbench makes of one
_LONG_SECONDS = 3600
_TABLES_AT_ONCE = 500


def certificate(directory: Path) -> tuple[Path, Path] | None:
    """Make a self-signed certificate for 127.0.0.1 with the openssl command; None where there is none."""
    if shutil.which("openssl") is None:
        return None
    made = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", made[1], "-out", made[0], "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    made[0].chmod(0o644)
    return made


def over_tls(server: SeaweedServer, pair: tuple[Path, Path] | None) -> dict[str, str]:
    """Return the settings that lead an agent to `server` by TLS; none where there is no certificate."""
    if pair is None:
        return {}
    return {"AWS_ENDPOINT": str(server.https_endpoint), "WALG_S3_CA_CERT_FILE": str(pair[0])}


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what the benchmarks of base backups and restores are all asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of pgbench's tables")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every row to this file")
    return parser


@contextmanager
def measured_cluster(**configuration: str | int | bool) -> Iterator["MeasuredCluster"]:
    """Start it all, in a temporary directory; end and remove it."""
    directory = make_temporary_directory("pitr-bench-")
    pair = certificate(directory)
    stage = Stage(directory, certificate=pair)
    stage.agent.settings |= over_tls(stage.s3, pair)
    try:
        stage.start_s3()
        stage.initialise()
        stage.source.configure(
            shared_buffers="256MB", max_wal_size="8GB", autovacuum=False, max_locks_per_transaction=1000,
            **configuration,
        )  # fmt: skip
        stage.agent.start()
        stage.source.start()
        yield MeasuredCluster(stage)
    finally:
        stage.end()


class MeasuredCluster:
    """What is measured on the parts of `stage`, which run."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def pgbench(self, *arguments: str) -> None:
        """Run pgbench to its end."""
        self.stage.source.run("pgbench", *arguments, seconds=_LONG_SECONDS)

    def fill_pgbench(self, mib: int) -> None:
        """Make the tables of pgbench, of about `mib` MiB."""
        self.pgbench("-i", "-q", "-s", str(max(1, round(mib / _MIB_OF_A_SCALE))))

    def fill_tables(self, count: int) -> None:
        """Make `count` small tables, each with an index and a TOAST table: four files."""
        for start in range(0, count, _TABLES_AT_ONCE):
            self.stage.source.execute(
                *(
                    f"CREATE TABLE small_{number} AS SELECT i AS id, 'row ' || i AS t FROM generate_series(1, 20) i; "
                    f"ALTER TABLE small_{number} ADD PRIMARY KEY (id)"
                    for number in range(start, min(start + _TABLES_AT_ONCE, count))
                )
            )

    def filled(self, options: argparse.Namespace) -> Iterator[str]:
        """Fill the cluster with pgbench's tables, then with small ones besides; yield each work's name, settled."""
        fills: dict[str, Callable[[], None]] = {
            f"{options.mib} MiB": lambda: self.fill_pgbench(options.mib),
            f"and {options.tables} small tables": lambda: self.fill_tables(options.tables),
        }
        for work, fill in fills.items():
            fill()
            self.settle()
            yield work

    def settle(self) -> None:
        """Let the server write what it has to, so that no backup waits for that."""
        self.stage.source.execute("VACUUM ANALYZE", "CHECKPOINT")
        self.stage.source.wait_until_archived(self.stage.source.switch_wal(), seconds=_LONG_SECONDS)

    def restart_agent(self, **settings: str) -> psutil.Process:
        """Return a fresh agent, with `settings` besides, so that its memory is its own.

        It has looked through the repository, as every agent does at its start: nothing that is measured pays for it.
        """
        self.stage.agent.settings |= settings
        self.stage.agent.restart()
        agent = psutil.Process(self.stage.agent.pid)
        wait_until_idle(agent)
        return agent

    def floor(self, work: str) -> Row:
        """Measure PostgreSQL's own: `pg_basebackup`, packed by `lz4 -1` to local disk."""
        out, source = self.stage.directory / "floor", self.stage.source
        copy = f"'{source.binaries['pg_basebackup']}' -F tar -X none -c fast -D - | lz4 -1 -q -c > '{out}'"
        server = psutil.Process(source.pid)
        cpu, started = cpu_of_all(server), time.perf_counter()
        used = run(["/bin/sh", "-c", copy], agent_environment(source.client_environment))
        wall, cpu = time.perf_counter() - started, cpu_of_all(server) - cpu + used.ru_utime + used.ru_stime
        row = Row(work, "pg_basebackup | lz4 -1", wall, cpu, stored_mib=out.stat().st_size / MIB)
        out.unlink()
        return row

    def backup(self, work: str, how: str, *options: str, **settings: str) -> Row:
        """Measure `pitr backup now` with a fresh agent."""
        agent, stage = self.restart_agent(**settings), self.stage
        server, store = psutil.Process(stage.source.pid), psutil.Process(stage.s3.pid)
        idle = memory_mib(agent, "VmRSS")
        Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # VmHWM begins anew

        def used() -> float:
            return cpu_of_ended_children() + cpu_of(agent) + cpu_of_all(server)

        cpu, s3_cpu, started = used(), cpu_of_all(store), time.perf_counter()
        self.back_up(*options)
        wall = time.perf_counter() - started
        read, stored = (stage.agent.metric(f"pitr_backup_{what}_bytes") / MIB for what in ("read", "stored"))
        return Row(
            work, how, wall, used() - cpu, cpu_of_all(store) - s3_cpu, read, stored, idle, memory_mib(agent, "VmHWM")
        )

    def back_up(self, *options: str) -> str:
        """Take a base backup; return its name."""
        done = run_pitr("backup", "now", "--json", *options, settings=self.stage.agent.settings, seconds=_LONG_SECONDS)
        if done.returncode:
            raise RuntimeError(f"pitr backup now exited with {done.returncode}: {done.stderr[-500:]}")
        return str(json.loads(done.stdout)["backup"])
