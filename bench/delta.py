"""Takes deltas through the agent after a share of the pages changed: by reading all pages, and by WAL summaries.

    make bench-delta                                   # 300 MiB of pgbench, 5 % changed, 3 rounds
    make bench-delta ARGS="--mib 3000"

All build on one full backup; each has the same changes to store. The floor, in the same run: `pg_basebackup | lz4 -1`
to local disk, of everything. Needs PostgreSQL 17 or later, as the embedded one is. CPU counts PostgreSQL's, the agent's
and the command's; memory is the agent's: before, and at its peak.
"""

import argparse

from rich.console import Console

from agent.lab.waiting import wait_until
from bench.cluster import MeasuredCluster, arguments_of, measured_cluster
from bench.measuring import Row, table, write_json


def change(cluster: MeasuredCluster, percent: float) -> None:
    """Change rows in about `percent` of the pages, half of them where the new versions of the rows go."""
    last = f"(SELECT max(aid) * {percent / 200} FROM pgbench_accounts)"
    cluster.stage.source.execute(f"UPDATE pgbench_accounts SET abalance = 1 WHERE aid <= {last}", "CHECKPOINT")


def summarize(cluster: MeasuredCluster, setting: str) -> None:
    """Switch WAL summaries `on` or `off`."""
    source = cluster.stage.source
    source.execute(f"ALTER SYSTEM SET summarize_wal = {setting}", "SELECT pg_reload_conf()")
    wait_until(lambda: source.value("SHOW summarize_wal") == setting, seconds=30, what=f"summarize_wal {setting}")


def measure(cluster: MeasuredCluster, options: argparse.Namespace) -> list[Row]:
    """Take a full backup, change pages, take deltas: by WAL summaries first, for switching them off leaves a gap."""
    work = f"{options.mib} MiB, {options.percent:g} % changed"
    cluster.fill_pgbench(options.mib)
    cluster.settle()
    rows = [cluster.floor(work), cluster.backup(work, "pitr, full", "--full")]
    full = cluster.back_up("--full")
    change(cluster, options.percent)
    for how, setting in (("pitr, WAL summaries", "on"), ("pitr, all pages read", "off")):
        summarize(cluster, setting)
        rows += [cluster.backup(work, how, "--delta", WALG_DELTA_FROM_NAME=full) for _ in range(options.rounds)]
    return rows


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = arguments_of(__doc__)
    parser.add_argument("--percent", type=float, default=5, help="of the pages changed")
    options = parser.parse_args()
    with measured_cluster(summarize_wal=True) as cluster:
        rows = measure(cluster, options)
    write_json(options.json, rows)
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
