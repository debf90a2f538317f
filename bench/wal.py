"""Archives and fetches WAL through the agent as PostgreSQL does, one call after the other, beside floors.

    make bench                            # 100 segments, 3 rounds, plain HTTP and TLS
    make bench ARGS="--segments 300 --rounds 1 --codec lz4"
    make bench ARGS="--segments 0 --alone 0 --large 1024"   # segments of 1 GiB alone

Every call is `/bin/sh -c COMMAND` in the data directory and must exit 0 before the next. All is fetched twice: once to
compare the bytes, then timed. What was fetched is removed at once, so that the next is written into the same memory: on
a virtual machine that returns free memory to its host other memory costs several times as much, and whoever comes first
would pay it for the others.
Floors, in the same round: `cp`, and `lz4 -1` to a local file, called the same way; for the lone calls bare PUTs, of the
bytes that they stored and of the segments as they are. Compare rows of one round by their ratio to the lz4 floor: the
speed of a machine changes from hour to hour. CPU counts agent and hooks; the S3 server has its own column, because it
works on the same cores. Memory is the agent's: idle before the round, and its peak, which it must keep within its
limit: else the benchmark fails. Segments of another size (--large) are put together of real ones, and archived and
fetched in order.
"""

import argparse
import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console

from agent.lab.agent_process import AgentProcess
from agent.lab.privileges import hand_over, make_directory, make_temporary_directory
from agent.lab.seaweedfs import SeaweedServer
from bench.bare_put import BarePut
from bench.cluster import certificate, over_tls
from bench.measuring import MIB, cpu_of, cpu_of_ended_children, memory_mib, write_json
from bench.wal_report import PLAIN_PUT, STORED_PUT, Row, over_limits, p99_of, table
from bench.wal_sample import large_segments, wal_sample

_BUCKET = "bench"
FLOORS = (  # name, archive_command, restore_command
    ("cp", "cp %p ../%f", "cp ../%f %p"),
    ("lz4 -1", "lz4 -1 -q -f %p ../%f.lz4", "lz4 -d -q -f ../%f.lz4 %p"),
)
_ALONE_SECONDS = 0.2  # between calls that are each the only one waiting
_LARGE_SEGMENTS = 3
_SEGMENTS_IN_LARGE = 20  # real ones, again and again


class Calls:
    """Runs command lines one after the other and takes their times."""

    def __init__(self, directory: Path, agent: AgentProcess | None, server: SeaweedServer) -> None:
        self._directory = directory
        self._environment = {"PATH": os.environ["PATH"], **(agent.settings if agent else {})}
        self._agent = psutil.Process(agent.pid) if agent else None
        self._server = psutil.Process(server.pid)

    def measure(
        self,
        work: str,
        how: str,
        segment_mib: float,
        commands: Sequence[str],
        before: Callable[[int], None],
        after: Callable[[int], None],
    ) -> Row:
        """Run `commands`; call `before` and `after` with each one's number, untimed."""
        idle = self._memory("VmRSS")
        latencies: list[float] = []
        used, server_used = self._cpu(), cpu_of(self._server)
        for number, command in enumerate(commands):
            before(number)
            started = time.perf_counter()
            subprocess.run(["/bin/sh", "-c", command], cwd=self._directory, env=self._environment, check=True)
            latencies.append(time.perf_counter() - started)
            after(number)
        ordered = sorted(latencies)
        return Row(
            work=work,
            how=how,
            segment_mib=segment_mib,
            calls=len(commands),
            wall=sum(latencies),
            p50=statistics.median(ordered),
            p99=p99_of(ordered),
            cpu=self._cpu() - used,
            server_cpu=cpu_of(self._server) - server_used,
            idle_mib=idle,
            peak_mib=self._memory("VmHWM"),
        )

    def _cpu(self) -> float:
        return cpu_of_ended_children() + (cpu_of(self._agent) if self._agent else 0.0)

    def _memory(self, field: str) -> float:
        return memory_mib(self._agent, field) if self._agent else 0.0


def _nothing(_number: int) -> None:
    """Between calls that follow each other at once."""


class Round:
    """One round on a fresh data directory that holds nothing but WAL."""

    def __init__(self, directory: Path, segments: Sequence[Path], server: SeaweedServer) -> None:
        self.data = directory / "pgdata"
        self.status = self.data / "pg_wal" / "archive_status"
        self._segments = segments
        self._server = server
        for path in (self.status, self.data / "global"):
            path.mkdir(parents=True)
        shutil.copy(segments[0].parent / "pg_control", self.data / "global")
        (self.data / "PG_VERSION").write_text("18\n")
        for segment in segments:
            shutil.copy(segment, self.data / "pg_wal")
            segment.read_bytes()  # in the page cache, as just written WAL is
        hand_over(directory)

    def run(
        self,
        how: str,
        agent: AgentProcess | None,
        archive: str,
        fetch: str,
        alone: int,
        bare_put: BarePut | None = None,
    ) -> list[Row]:
        """Archive all but the last `alone` segments as a backlog, those one by one, and fetch the first back."""
        names = [segment.name for segment in self._segments]
        mib = self._segments[0].stat().st_size / MIB
        backlog, single = names[: len(names) - alone], names[len(names) - alone :]
        calls = Calls(self.data, agent, self._server)
        for name in backlog:
            self._ready(name).touch()

        def archived(among: Sequence[str]) -> Callable[[int], None]:
            return lambda number: self._done(among[number])

        def filled(command: str, among: Sequence[str], path: str) -> list[str]:
            return [command.replace("%p", path).replace("%f", name) for name in among]

        def wait_and_mark(number: int) -> None:
            time.sleep(_ALONE_SECONDS)
            self._ready(single[number]).touch()

        own, rows = "pg_wal/%f", []
        if backlog:
            rows = [calls.measure("archive", how, mib, filled(archive, backlog, own), _nothing, archived(backlog))]
        if single:
            commands = filled(archive, single, own)
            rows.append(calls.measure("archive alone", how, mib, commands, wait_and_mark, archived(single)))
        if single and bare_put is not None:
            rows.append(self._bare(STORED_PUT, how, bare_put, map(bare_put.stored, single)))
            plain = (self.data / "pg_wal" / name for name in single)
            rows.append(self._bare(PLAIN_PUT, how, bare_put, map(Path.read_bytes, plain)))

        if backlog:
            commands, landed = filled(fetch, backlog, "pg_wal/RECOVERYXLOG"), self.data / "pg_wal" / "RECOVERYXLOG"

            def compare(number: int) -> None:
                if not filecmp.cmp(self._segments[number], landed, shallow=False):
                    sys.exit(f"{backlog[number]} came back changed")
                landed.unlink()

            calls.measure("fetch", how, mib, commands, _nothing, compare)
            rows.append(calls.measure("fetch", how, mib, commands, _nothing, lambda _: landed.unlink()))
        return rows

    def _bare(self, put: str, how: str, bare_put: BarePut, bodies: Iterable[bytes]) -> Row:
        """PUT `bodies`, each the only one under way, beside the lone calls of the agent `how`."""
        seconds = []
        for body in bodies:
            time.sleep(_ALONE_SECONDS)
            seconds.append(bare_put.seconds(body))
        mib, p50, p99 = self._segments[0].stat().st_size / MIB, statistics.median(seconds), p99_of(sorted(seconds))
        return Row("archive alone", how.replace("agent", put), mib, len(seconds), sum(seconds), p50, p99, 0, 0, 0, 0)

    def _ready(self, name: str) -> Path:
        return self.status / f"{name}.ready"

    def _done(self, name: str) -> None:
        self._ready(name).rename(self.status / f"{name}.done")


def one_round(segments: Sequence[Path], alone: int, server: SeaweedServer, options: argparse.Namespace) -> list[Row]:
    """Measure the floors and the agent, each in a directory of its own; the last `alone` segments one by one."""
    rows: list[Row] = []
    for name, archive, fetch in FLOORS:
        if shutil.which(name.split()[0]) is not None:
            floor = partial(Round.run, how=name, agent=None, archive=archive, fetch=fetch, alone=0)
            rows += _in_directory(segments, server, floor)
    for codec in options.codec:
        for scheme in ("http", "https") if server.https_endpoint else ("http",):
            agent = partial(_agent, server=server, codec=codec, scheme=scheme, alone=alone, options=options)
            rows += _in_directory(segments, server, agent)
    return rows


def _in_directory(segments: Sequence[Path], server: SeaweedServer, run: Callable[[Round], list[Row]]) -> list[Row]:
    directory = make_temporary_directory("pitr-bench-")
    try:
        return run(Round(directory, segments, server))
    finally:
        shutil.rmtree(directory)


def _agent(
    measured: Round, server: SeaweedServer, codec: str, scheme: str, alone: int, options: argparse.Namespace
) -> list[Row]:
    home, hooks = measured.data.parent, Path(sys.executable).parent
    settings = {
        **server.environment(_BUCKET, home.name),
        "PGDATA": str(measured.data),
        "WALG_COMPRESSION_METHOD": codec,
    }
    pair = options.certificate if scheme == "https" else None
    settings |= over_tls(server, pair)
    with AgentProcess(home / "agent", settings) as agent:
        agent.start()
        archive = f"{hooks / 'wal-archive.sh'} %p %f"
        fetch = f"{hooks / 'wal-restore.sh'} %f %p"
        ca = pair[0] if pair else None
        bare_put = BarePut(settings["AWS_ENDPOINT"], (server.access_key, server.secret_key), _BUCKET, home.name, ca)
        return measured.run(f"agent, {codec}, {scheme}", agent, archive, fetch, alone, bare_put)


def measure(options: argparse.Namespace, segments: Sequence[Path]) -> list[Row]:
    """Run every round on a server of its own, and what there is of large segments once."""
    directory = make_temporary_directory("pitr-bench-s3-")
    make_directory(directory)
    try:
        options.certificate = certificate(directory)
        with SeaweedServer(directory / "s3", certificate=options.certificate) as server:
            server.create_bucket(_BUCKET)
            count = options.segments + options.alone
            rounds = options.rounds if count else 0
            rows = [row for _ in range(rounds) for row in one_round(segments[:count], options.alone, server, options)]
            if options.large:
                large = large_segments(directory / "large", segments, options.large * MIB, _LARGE_SEGMENTS)
                rows += one_round(large, 0, server, options)
            return rows
    finally:
        shutil.rmtree(directory)


def main() -> None:
    """Run the benchmark that the command line asks for; fail if the agent needed more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=100, help="archived as a backlog, and fetched back")
    parser.add_argument("--alone", type=int, default=20, help="archived one by one besides")
    parser.add_argument("--large", type=int, default=256, help="MiB of the large segments, a power of two; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", nargs="+", default=["zstd", "lz4"])
    parser.add_argument("--sample", type=Path, default=Path(".cache/bench/wal"), help="where the segments are kept")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args()
    count = max(options.segments + options.alone, _SEGMENTS_IN_LARGE if options.large else 0)
    rows = measure(options, wal_sample(options.sample.resolve(), count))
    write_json(options.json, rows)
    console = Console(width=170)
    for segment_mib in sorted({row.segment_mib for row in rows}):
        console.print(table([row for row in rows if row.segment_mib == segment_mib]))
    if problems := over_limits(rows):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
