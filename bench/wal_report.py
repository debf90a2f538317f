"""What a benchmark of the WAL path has measured: a table of ratios, and whether memory kept within its limits."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

IDLE_LIMIT_MIB = 90
LOAD_LIMIT_MIB = 256
"""Above the idle process: the default of PITR_MEMORY_LIMIT."""

STORED_PUT, PLAIN_PUT = "PUT of stored", "PUT of plain"
"""Bare PUTs: of the bytes that the agent stored for a segment, and of the segment's own."""

ALONE = "archive alone"


@dataclass(frozen=True)
class Row:
    """One measurement: times in seconds, sizes in MiB."""

    work: str
    how: str
    segment_mib: float
    calls: int
    wall: float
    p50: float
    p99: float
    cpu: float
    server_cpu: float
    idle_mib: float
    peak_mib: float

    @property
    def is_of_the_agent(self) -> bool:
        return self.how.startswith("agent")

    def beside(self, put: str) -> tuple[str, str]:
        """Work and way of the row of bare PUTs that this one is compared with besides the lz4 command."""
        return self.work, self.how.replace("agent", put)


def p99_of(ordered: Sequence[float]) -> float:
    """Return the 99th percentile of sorted values."""
    return ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]


def over_limits(rows: Sequence[Row]) -> list[str]:
    """Say where the agent took more memory than it may: before it had anything to do, and under load."""
    idle = min((row.idle_mib for row in rows if row.is_of_the_agent), default=0.0)
    problems = [f"idle, the agent has {idle:.0f} MiB resident, more than {IDLE_LIMIT_MIB}"] * (idle > IDLE_LIMIT_MIB)
    return problems + [
        f"{row.work}, {row.how}: {row.peak_mib:.0f} MiB at the peak, over {LOAD_LIMIT_MIB} more than idle ({idle:.0f})"
        for row in rows
        if row.is_of_the_agent and row.peak_mib > idle + LOAD_LIMIT_MIB
    ]


def table(rows: Sequence[Row]) -> Table:
    """Return the medians over the rounds, one line for each kind of work and way of doing it."""
    result = Table(title=f"per segment of {rows[0].segment_mib:.0f} MiB, medians of the rounds", title_justify="left")
    for heading in ("work", "how"):
        result.add_column(heading, no_wrap=True)
    for heading in _HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.work, row.how), []).append(row)
    for (work, how), group in groups.items():
        lz4 = groups.get((work.removesuffix(" alone"), "lz4 -1"), group)
        is_alone = work == ALONE and group[0].is_of_the_agent
        puts = [groups.get(group[0].beside(put)) if is_alone else None for put in (STORED_PUT, PLAIN_PUT)]
        result.add_row(work, how, *_cells(group, lz4, puts))
    return result


_HEADINGS = (
    "ms", "x lz4", "MiB/s", "p50 ms", "x stored", "x plain", "p99 ms", "CPU ms", "x lz4 CPU", "S3 CPU ms", "idle MiB",
    "peak MiB",
)  # fmt: skip


def _cells(group: Sequence[Row], lz4: Sequence[Row], puts: Sequence[Sequence[Row] | None]) -> list[str]:
    def of(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
        return statistics.median(value(row) for row in rows)

    def wall(row: Row) -> float:
        return row.wall / row.calls

    def cpu(row: Row) -> float:
        return row.cpu / row.calls

    p50 = of(group, lambda row: row.p50)
    return [
        f"{1000 * of(group, wall):.1f}",
        f"{of(group, wall) / of(lz4, wall):.2f}",
        f"{group[0].segment_mib / of(group, wall):.0f}",
        f"{1000 * p50:.1f}",
        *(f"{p50 / of(put, lambda row: row.p50):.2f}" if put else "" for put in puts),
        f"{1000 * of(group, lambda row: row.p99):.1f}",
        f"{1000 * of(group, cpu):.1f}",
        f"{of(group, cpu) / of(lz4, cpu):.2f}" if of(lz4, cpu) else "",
        f"{1000 * of(group, lambda row: row.server_cpu / row.calls):.1f}",
        f"{of(group, lambda row: row.idle_mib):.0f}",
        f"{of(group, lambda row: row.peak_mib):.0f}",
    ]
