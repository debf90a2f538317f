"""What a real server does in a busy minute, and what `pg_waldump` says of its WAL."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from agent.domain.transactions import EndedTransaction, Mark, TransactionReader
from agent.domain.wal_walk import WalWalk
from agent.lab.postgres import PostgresCluster

# One transaction each: what it is to be marked with, and its statements.
HISTORY: Sequence[tuple[Mark | None, Sequence[str]]] = (
    (None, ["CREATE TABLE a (id int PRIMARY KEY, note text)"]),
    (None, ["CREATE TABLE b AS SELECT n AS id, repeat('x', 100) AS note FROM generate_series(1, 1500) AS n"]),
    (None, ["INSERT INTO a SELECT n, 'row' FROM generate_series(1, 300) AS n"]),
    (None, ["INSERT INTO a VALUES (301, 'x')", "SAVEPOINT s", "INSERT INTO a VALUES (302, 'y')", "RELEASE s"]),
    (None, ["DELETE FROM a WHERE id > 299"]),
    (Mark.UPDATE, ["UPDATE b SET note = 'y'"]),
    (Mark.DELETE, ["SAVEPOINT s", "DELETE FROM b WHERE id > 100", "RELEASE s"]),
    (None, ["CREATE INDEX b_id ON b (id)"]),
    (Mark.REWRITE, ["CREATE UNLOGGED TABLE u (i int)", "ALTER TABLE b ALTER id TYPE bigint"]),
    (Mark.TRUNCATE, ["TRUNCATE a"]),
    (Mark.REWRITE, ["REINDEX TABLE b"]),
    (None, ["CREATE TABLE gone (i int)", "INSERT INTO gone VALUES (1)", "DROP TABLE gone"]),
    (Mark.DROP, ["DROP INDEX b_id"]),
    (Mark.DROP, ["INSERT INTO a VALUES (1, 'z')", "DROP TABLE b"]),
    (Mark.DROP, ["CREATE TYPE t AS (i int)", "DROP TABLE u"]),
)


@dataclass
class Lived:
    """What came of it.

    marks: by the ids of the transactions that committed. aborted: ids of the others. files: of tables dropped since.
    """

    marks: dict[int, Mark | None] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)


def live(cluster: PostgresCluster) -> Lived:
    """Do all of `HISTORY` and more on a running server, one after the other."""
    lived = Lived()
    for mark, statements in HISTORY:
        if "DROP TABLE b" in statements:
            lived.files["b"] = _file_of(cluster, "b")
        lived.marks[_in_one(cluster, statements)] = mark
    cluster.execute("VACUUM FULL a", "VACUUM a")
    lived.aborted.add(_in_one(cluster, ["CREATE TABLE never (i int)", "DELETE FROM a"], end="ROLLBACK"))
    for end in ("COMMIT", "ROLLBACK"):
        table = f"CREATE TABLE prepared_{end} (i int)"
        drop = "DROP TABLE IF EXISTS prepared_COMMIT" if end == "COMMIT" else "DELETE FROM a"
        cluster.execute("CREATE TABLE prepared_COMMIT (i int)" if end == "COMMIT" else "SELECT 1")
        xid = _in_one(cluster, [drop, table.replace("prepared_", "then_")], end="PREPARE TRANSACTION 'p'")
        cluster.execute(f"{end} PREPARED 'p'")
        if end == "COMMIT":
            lived.marks[xid] = Mark.REWRITE  # one file less, one more: it cannot be told apart
        else:
            lived.aborted.add(xid)
    cluster.execute("CREATE DATABASE side")
    cluster.execute("DROP DATABASE side")
    return lived


def _file_of(cluster: PostgresCluster, table: str) -> str:
    return "{}/{}".format(
        *cluster.query(
            "SELECT d.oid, pg_relation_filenode(%s) FROM pg_database AS d WHERE datname = current_database()", [table]
        )[0]
    )


def _in_one(cluster: PostgresCluster, statements: Sequence[str], *, end: str = "COMMIT") -> int:
    """Run `statements` in one transaction; return its id."""
    with cluster.connect(autocommit=True) as connection:
        connection.execute("BEGIN")
        for statement in statements:
            connection.execute(statement)
        (xid,) = connection.execute("SELECT txid_current()").fetchone() or (0,)
        connection.execute(end)
    return int(xid)


def segments_of(cluster: PostgresCluster, last: str) -> list[Path]:
    """Return the WAL segments of a stopped or switched server, up to `last`."""
    files = sorted((cluster.data_directory / "pg_wal").glob("[0-9A-F]" * 24))
    return [path for path in files if path.name <= last]


def read_transactions(segments: Sequence[Path]) -> tuple[list[EndedTransaction], TransactionReader]:
    """Return the transactions that end in consecutive segments, by our rules."""
    walk, reader, ended = WalWalk(), None, []
    for path in segments:
        for lsn, data in walk.take(path.read_bytes()):
            reader = reader or TransactionReader(walk.magic)
            each = reader.take(lsn, data)
            if each is not None:
                ended.append(each)
    assert reader is not None
    return ended, reader


@dataclass(frozen=True)
class Told:
    """One commit or abort as `pg_waldump` prints it."""

    xid: int
    lsn: int
    time: datetime
    commits: bool
    files: frozenset[str]
    subtransactions: int


_LINE = re.compile(
    r"rmgr: Transaction .* tx: +(?P<tx>\d+), lsn: (?P<high>[0-9A-F]+)/(?P<low>[0-9A-F]+), .*"
    r"desc: (?P<what>COMMIT|ABORT)(_PREPARED)? (?:(?P<xid>\d+): )?(?P<time>[\d-]+ [\d:.]+) UTC(?P<rest>.*)"
)


def waldump(program: Path, segments: Sequence[Path]) -> Iterator[Told]:
    """Yield what `pg_waldump` says of transactions that end in `segments`."""
    command = [program, segments[0], segments[-1]]
    said = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    )
    for line in said.stdout.splitlines():
        match = _LINE.match(line)
        if match:
            rest = dict(re.findall(r"; (rels|subxacts): ([^;]*)", match["rest"]))
            yield Told(
                xid=int(match["xid"] or match["tx"]),
                lsn=int(match["high"], 16) << 32 | int(match["low"], 16),
                time=datetime.fromisoformat(match["time"]).replace(tzinfo=UTC),
                commits=match["what"] == "COMMIT",
                files=frozenset(path.removeprefix("base/") for path in rest.get("rels", "").split()),
                subtransactions=len(rest.get("subxacts", "").split()),
            )
