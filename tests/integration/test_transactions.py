"""What we read out of the WAL of a real server is what it did, and what its own pg_waldump says."""

from pathlib import Path

import pytest

from agent.domain.relation_names import Relation
from agent.domain.transactions import Mark
from agent.lab.postgres_binaries import MAJORS
from tests.support.postgres import MakeCluster
from tests.support.wal_history import live, read_transactions, segments_of, waldump

DEBIAN = Path("/usr/lib/postgresql")


@pytest.mark.parametrize("major", MAJORS)
def test_transactions_and_what_they_dropped_are_read_as_they_happened(major: int, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(major, max_prepared_transactions=2, wal_keep_size="64MB")
    cluster.start()
    lived = live(cluster)
    last = cluster.switch_wal()

    segments = segments_of(cluster, last)
    transactions, reader = read_transactions(segments)

    by_xid = {each.xid: each for each in transactions}
    marks = {xid: by_xid[xid].marks[0] if by_xid[xid].marks else None for xid in lived.marks}
    assert marks == lived.marks
    assert all(not by_xid[xid].commits and by_xid[xid].marks == () for xid in lived.aborted)
    (drop,) = (each for each in transactions if lived.files["b"] in map(str, each.dropped) and each.xid in lived.marks)
    names = {str(file): reader.names.get(file) for file in drop.dropped}
    assert names[lived.files["b"]] == Relation("table", "b")
    assert [each.marks[0] for each in transactions if each.dropped_databases] == [Mark.DROP_DATABASE]

    program = next(
        filter(Path.exists, (cluster.binaries.directory / "pg_waldump", DEBIAN / f"{major}/bin/pg_waldump")), None
    )
    if program is not None:
        told = list(waldump(program, segments))
        assert [(t.xid, t.lsn, t.time, t.commits, t.subtransactions) for t in told] == [
            (e.xid, e.lsn, e.time, e.commits, e.subtransactions) for e in transactions
        ]
        assert len(told) > len(lived.marks)
        for tells, each in zip(told, transactions, strict=True):
            assert {str(file) for file in each.dropped} <= tells.files
