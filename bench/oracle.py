"""Asks a synthetic archive of 100,000 segments what can be restored, with a round trip's delay for each request.

make bench-oracle                     # 100,000 segments, 20 ms a request
make bench-oracle ARGS="--segments 500000 --milliseconds 50"
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import structlog
from rich.console import Console
from rich.table import Table

from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.errors import NoRestorePath
from agent.repository.wal_archive import WalArchive
from agent.repository.window import read_window
from agent.restore.planner import plan_from_repository
from tests.support.large_archive import LargeArchive
from tests.support.object_formats import PLAIN
from tests.support.wal_writer import SEGMENT_BYTES


async def _plan(target: RestoreTarget, store: LargeArchive, archive: WalArchive) -> None:
    with suppress(NoRestorePath):
        await plan_from_repository(store, archive, target)


async def measure(segments: int, seconds: float) -> Table:
    """Ask each question once, of an archive that nothing is known of yet."""
    bulk = range(segments * 6 // 10, segments * 2 // 3)
    targets = {
        "plan, a time": RestoreTarget(TargetKind.TIME, time=LargeArchive.moment(segments // 3, seconds=1)),
        "plan, a time in a bulk load": RestoreTarget(TargetKind.TIME, time=LargeArchive.moment(bulk.start + 500)),
        "plan, an LSN": RestoreTarget(TargetKind.LSN, lsn=segments // 2 * SEGMENT_BYTES + 40),
        "plan, a transaction": RestoreTarget(TargetKind.XID, xid=1000 + segments // 3 * 3 + 1),
        "plan, a transaction that never ended": RestoreTarget(TargetKind.XID, xid=1000 + segments // 6 * 3),
        "plan, the end": RestoreTarget(),
    }
    questions: dict[str, Callable[[LargeArchive, WalArchive], Awaitable[object]]] = {
        "window": read_window,
        **{name: partial(_plan, target) for name, target in targets.items()},
    }
    table = Table("question", "seconds", "list pages", "HEAD", "downloads", "catalog reads")
    for name, ask in questions.items():
        store = LargeArchive(segments, backup_every=segments // 14, bulk=bulk, seconds=seconds)
        await store.prepare()
        begun = time.perf_counter()
        await ask(store, WalArchive(store, PLAIN))
        took, asked = time.perf_counter() - begun, store.requests
        row = (asked["list"], asked["head"], asked["open"], asked["document"])
        table.add_row(name, f"{took:.2f}", *map(str, row))
    return table


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--segments", type=int, default=100_000)
    parser.add_argument("--milliseconds", type=float, default=20)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    Console().print(asyncio.run(measure(options.segments, options.milliseconds / 1000)))


if __name__ == "__main__":
    main()
