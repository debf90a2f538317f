"""Takes full base backups through the agent, beside a floor, and tells what they cost a pgbench running meanwhile.

    make bench-backup                                    # 300 MiB of pgbench, 2000 small tables, 3 rounds
    make bench-backup ARGS="--mib 3000 --tables 5000"    # 20 000 files of small tables, as peers were measured
    make bench-backup ARGS="--mib 3000 --tables 50000"

The floor, in the same round: `pg_basebackup | lz4 -1` to local disk. Compare rows of one round by their ratio to it:
the speed of a machine changes from hour to hour. CPU counts PostgreSQL's, the agent's and the command's; the S3 server
has a column of its own. Memory is the agent's: before, and at its peak.
"""

import shutil
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.cluster import CODECS, MeasuredCluster, arguments_of, measured_cluster
from bench.measuring import Row, table, write_json


@dataclass(frozen=True, slots=True)
class Load:
    """What pgbench got done: transactions a second, and how long they took in milliseconds."""

    work: str
    tps: float
    p50: float
    p99: float


def loads(cluster: MeasuredCluster, seconds: int, codec: str) -> list[Load]:
    """Measure pgbench alone and with backups one after the other."""
    rows = [_load(cluster, "pgbench alone", seconds)]
    cluster.restart_agent(WALG_COMPRESSION_METHOD=codec)
    enough = threading.Event()

    def back_up() -> None:
        while not enough.is_set():
            cluster.back_up("--full")

    thread = threading.Thread(target=back_up)
    thread.start()
    rows.append(_load(cluster, f"pgbench with backups ({codec})", seconds))
    enough.set()
    thread.join()
    return rows


def _load(cluster: MeasuredCluster, work: str, seconds: int) -> Load:
    logs = cluster.stage.directory / "transactions"
    logs.mkdir(mode=0o777)
    logs.chmod(0o777)
    cluster.pgbench("-n", "-c", "4", "-j", "1", "-T", str(seconds), "-l", f"--log-prefix={logs}/log")
    took = sorted(int(line.split()[2]) / 1000 for path in logs.iterdir() for line in path.open())
    shutil.rmtree(logs)
    return Load(work, len(took) / seconds, statistics.median(took), took[round(0.99 * (len(took) - 1))])


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
    parser = arguments_of(__doc__)
    parser.add_argument("--tables", type=int, default=2000, help="small tables, four files each")
    parser.add_argument("--load-seconds", type=int, default=20, help="of pgbench, alone and with backups; 0: none")
    parser.add_argument("--codec", nargs="+", choices=CODECS, default=CODECS)
    options = parser.parse_args()
    rows: list[Row] = []
    beside: list[Load] = []
    with measured_cluster() as cluster:
        for work in cluster.filled(options):
            for _ in range(options.rounds):
                rows.append(cluster.floor(work))
                rows += [
                    cluster.backup(work, f"pitr {codec}", "--full", WALG_COMPRESSION_METHOD=codec)
                    for codec in options.codec
                ]
        if options.load_seconds:
            beside = loads(cluster, options.load_seconds, options.codec[-1])
    write_json(options.json, [*rows, *beside])
    console = Console(width=160)
    console.print(table(rows))
    if beside:
        console.print(load_table(beside))


if __name__ == "__main__":
    main()
