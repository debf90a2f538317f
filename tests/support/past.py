"""The past of a database cluster, through branches of its timeline: who wrote what, when, and where it is in the WAL.

`Tellers` write as pgbench does, several at once, and note what they write. `Past` knows from `pg_waldump`, which reads
copies of the archived files, in which order it came to be, and says what each recovery must give.
"""

import itertools
import os
import random
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from agent.domain.catalog import Backup
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.timeline import parse_history
from agent.domain.wal_records import RecordKind
from agent.domain.wal_scan import scan_segment
from agent.errors import ConfigError
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import PostgresBinaries
from agent.lab.waiting import wait_until
from tests.support.wal_sources import join_records

ACCOUNTS = 60
WRITERS = 3
TABLES = (
    "CREATE TABLE accounts AS SELECT n AS aid, 0::bigint AS balance, repeat(' ', 80) AS filler"
    f" FROM generate_series(0, {ACCOUNTS - 1}) AS n",
    "ALTER TABLE accounts ADD PRIMARY KEY (aid)",
    "CREATE TABLE history (id bigint PRIMARY KEY, aid int, delta int, at timestamptz DEFAULT clock_timestamp(),"
    " filler text)",
)
_SECONDS = 90
_XID = "SELECT txid_current() & 4294967295"
_LINE = re.compile(
    r"rmgr: \S+ .* tx: +(?P<tx>\d+), lsn: (?P<high>[0-9A-F]+)/(?P<low>[0-9A-F]+), .*?desc: (?P<what>\S+) ?(?P<rest>.*)"
)
_ENDED = re.compile(r"(?:(?P<xid>\d+): )?(?P<time>[\d-]+ [\d:.]+) UTC")


@dataclass(frozen=True)
class Record:
    """One WAL record. `ends`: it commits (True) or aborts (False) the transaction `xid` at `time`; else None."""

    lsn: int
    ends: bool | None = None
    xid: int = 0
    time: datetime | None = None
    point: str | None = None


def read_records(binaries: PostgresBinaries, segments: Sequence[Path]) -> Iterator[Record]:
    """Yield the records of consecutive segments, as `pg_waldump` tells them.

    Packages without it: the agent's own reading, which other tests compare with it, and then only the records that a
    recovery can stop at.
    """
    try:
        program = binaries["pg_waldump"]
    except ConfigError:
        for each in join_records(scan_segment(path.read_bytes()) for path in segments):
            ends = each.kind is RecordKind.COMMIT if each.ends_transaction else None
            point = each.name if each.kind is RecordKind.RESTORE_POINT else None
            yield Record(each.lsn, ends, each.xid, each.time if each.ends_transaction else None, point)
        return
    command = [program, segments[0], segments[-1]]
    environment = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout
    for match in filter(None, map(_LINE.match, said.splitlines())):
        lsn, what = int(match["high"], 16) << 32 | int(match["low"], 16), match["what"]
        if what.startswith(("COMMIT", "ABORT")) and (ended := _ENDED.match(match["rest"])):
            time = datetime.fromisoformat(ended["time"]).replace(tzinfo=UTC)
            yield Record(lsn, what.startswith("COMMIT"), int(ended["xid"] or match["tx"]), time)
        else:
            yield Record(lsn, point=match["rest"].strip() if what == "RESTORE_POINT" else None)


@dataclass(frozen=True)
class Acknowledged:
    """A transaction whose COMMIT returned, and the clock then."""

    xid: int
    at: datetime


@dataclass
class Life:
    """What the writers know of one timeline.

    first_xid: the first transaction id that was given on it.
    rows: by transaction id, the ids of the rows it inserted, whether it committed or not.
    acknowledged: those that were told to be committed.
    shown_until: the time of the last checkpoint that is archived.
    """

    first_xid: int = 0
    rows: dict[int, frozenset[int]] = field(default_factory=dict)
    acknowledged: list[Acknowledged] = field(default_factory=list)
    shown_until: datetime | None = None


@dataclass(frozen=True)
class Expected:
    """What a recovery from `backup` must give: the ids of the rows, and when the last transaction it counts ended."""

    backup: str
    rows: frozenset[int]
    last_at: datetime | None


@dataclass
class Past:
    """All timelines of one repository."""

    binaries: PostgresBinaries
    copies: Path
    lives: dict[int, Life] = field(default_factory=dict)
    backups: Sequence[Backup] = ()
    _records: dict[int, list[Record]] = field(default_factory=dict)

    def read_wal(self) -> None:
        """Read what has been archived by now."""
        for timeline in self.lives:
            segments = sorted(self.copies.glob(f"{timeline:08X}{'[0-9A-F]' * 16}"))
            self._records[timeline] = list(read_records(self.binaries, segments))

    def path(self, timeline: int) -> list[tuple[int, int, int]]:
        """Return the way to `timeline`: timelines with the LSNs between which they are on it."""
        if timeline == 1:
            return [(1, 0, 1 << 64)]
        history = parse_history(timeline, (self.copies / f"{timeline:08X}.history").read_text())
        ends = [(each.timeline, each.switch_lsn) for each in history] + [(timeline, 1 << 64)]
        starts = [0, *(end for _, end in ends)]
        # Newest first, as tliOfPointInHistory() in timeline.c looks: a later line holds over those before it.
        path: list[tuple[int, int, int]] = []
        for start, (number, _) in reversed(list(zip(starts, ends, strict=False))):
            until = path[0][1] if path else 1 << 64
            if start < until:
                path.insert(0, (number, start, until))
        return path

    def records(self, timeline: int) -> list[Record]:
        """Return the records on the way to `timeline`, in order."""
        return [
            each
            for number, start, end in self.path(timeline)
            for each in self._records[number]
            if start <= each.lsn < end
        ]

    def rows(self, timeline: int, records: Iterable[Record]) -> frozenset[int]:
        """Return the rows of what `records`, all on the way to `timeline`, commit."""
        lives = [self.lives[number] for number, _, _ in reversed(self.path(timeline))]
        committed = (each.xid for each in records if each.ends)
        # A prepared transaction may be committed on a later timeline than the one it was begun on.
        begun_on = ((next(life for life in lives if xid >= life.first_xid), xid) for xid in committed)
        return frozenset[int]().union(*(life.rows.get(xid, frozenset()) for life, xid in begun_on))

    def timeline_of(self, target: RestoreTarget, backup_name: str | None) -> int:
        """Return the timeline that a target means."""
        match target.timeline:
            case "latest":
                return max(self.lives)
            case "current":
                named = [backup for backup in self.backups if backup_name in (None, backup.name)]
                return max(named, key=lambda backup: backup.finish_time).timeline
        return int(target.timeline)

    def expect(self, target: RestoreTarget, backup_name: str | None) -> list[Expected]:
        """Return what a recovery must give: by the base backups that lead there, the newest first; none: refused."""
        timeline = self.timeline_of(target, backup_name)
        records, ends = self.records(timeline), {number: end for number, _, end in self.path(timeline)}
        found = []
        for backup in sorted(self.backups, key=lambda backup: backup.finish_lsn, reverse=True):
            if backup_name not in (None, backup.name) or backup.finish_lsn > ends.get(backup.timeline, 0):
                continue
            stop_lsn = self._stop(target, backup, timeline, [each for each in records if each.lsn >= backup.start_lsn])
            if stop_lsn is not None:
                replayed = [each for each in records if each.lsn < stop_lsn]
                times = [each.time for each in replayed if each.ends is not None and each.lsn >= backup.start_lsn]
                found.append(Expected(backup.name, self.rows(timeline, replayed), times[-1] if times else None))
        return found

    def _stop(self, target: RestoreTarget, backup: Backup, timeline: int, records: Sequence[Record]) -> int | None:
        """Return the LSN before which all is replayed, None if PostgreSQL does not stop, or too early.

        Source: recoveryStopsBefore() and recoveryStopsAfter() in PostgreSQL's xlogrecovery.c.
        """
        match target.kind:
            case TargetKind.END_OF_WAL:
                return 1 << 64
            case TargetKind.IMMEDIATE:
                return backup.finish_lsn
            case TargetKind.TIME:
                moment = target.time
                assert moment is not None
                if moment < backup.start_time:
                    return None
                stop = next((each for each in records if each.time and _is_beyond(each.time, target)), None)
                if stop is None:
                    return 1 << 64 if moment <= self._shown_until(timeline) else None
                return stop.lsn if stop.lsn >= backup.finish_lsn else None
            case TargetKind.LSN:
                assert target.lsn is not None
                lsn = target.lsn
                stop = next((each for each in records if each.lsn >= lsn), None)
                if lsn < backup.finish_lsn:
                    return None
            case TargetKind.XID:
                stop = next((each for each in records if each.ends is not None and each.xid == target.xid), None)
            case TargetKind.NAME:
                stop = next((each for each in records if each.point == target.name), None)
        if stop is None or stop.lsn < backup.finish_lsn:
            return None
        return stop.lsn + 1 if target.inclusive or target.kind is TargetKind.NAME else stop.lsn

    def _shown_until(self, timeline: int) -> datetime:
        shown = [self.lives[timeline].shown_until, *(each.time for each in self.records(timeline))]
        return max(each for each in shown if each is not None)

    def owed_by(self, timeline: int, moment: datetime) -> frozenset[int]:
        """Return the rows that clients knew to be committed at `moment`, on the way to `timeline`, by their clock."""
        owed: set[int] = set()
        for number, start, end in self.path(timeline):
            ended = {each.xid: each.lsn for each in self._records[number] if each.ends and start <= each.lsn < end}
            for known in self.lives[number].acknowledged:
                if known.at <= moment and known.xid in ended:
                    owed |= self.rows(timeline, [Record(ended[known.xid], True, known.xid)])
        return frozenset(owed)


def _is_beyond(time: datetime, target: RestoreTarget) -> bool:
    assert target.time is not None
    return time > target.time if target.inclusive else time >= target.time


class Tellers:
    """Threads that write until they are stopped, through crashes of the server; see the module."""

    _ids = itertools.count(1)

    def __init__(self, cluster: PostgresCluster, life: Life, seed: int) -> None:
        self._cluster = cluster
        self._life = life
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._lock = threading.Lock()
        self._ended = 0
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(seed + number)), name=f"teller {number}")
            for number in range(WRITERS)
        ]

    @contextmanager
    def writing(self) -> Iterator["Tellers"]:
        """Write inside the context; raise what ended a writer, if anything but the server's death did."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    def wait_for(self, transactions: int) -> None:
        """Return when so many more transactions have ended."""
        wanted = self._ended + transactions
        wait_until(lambda: self._ended >= wanted or bool(self._errors), seconds=_SECONDS, what="transactions to end")

    def _run(self, number: int, chance: random.Random) -> None:
        try:
            while not self._stop.is_set():
                try:
                    with self._cluster.connect() as session:
                        while not self._stop.wait(0.002):
                            self._transact(session, number, chance)
                except psycopg.OperationalError:
                    self._stop.wait(0.1)
        except Exception as error:  # noqa: BLE001 - raised where the test waits
            self._errors.append(error)

    def _transact(self, session: psycopg.Connection[tuple[object, ...]], number: int, chance: random.Random) -> None:
        how = chance.choices(("commit", "abort", "savepoint", "prepare", "resolve"), (12, 2, 3, 1, 1))[0]
        if how == "resolve":
            self._resolve(session, number, chance)
            return
        session.execute("BEGIN")
        xid = int(str((session.execute(_XID).fetchone() or (0,))[0]))
        # A prepared transaction keeps its locks for long: it must not stand in anybody's way.
        rows = [self._insert(session, number, chance, moves=how != "prepare") for _ in range(chance.randint(1, 3))]
        if how == "savepoint":
            session.execute("SAVEPOINT s")
            more = self._insert(session, number, chance)
            kept = chance.random() < 0.5
            session.execute("RELEASE s" if kept else "ROLLBACK TO s")
            rows += [more] if kept else []
        with self._lock:
            self._life.rows[xid] = frozenset(rows)
        match how:
            case "abort":
                session.execute("ROLLBACK")
            case "prepare":
                session.execute(f"PREPARE TRANSACTION 't{number}-{rows[0]}'")
            case _:
                session.execute("COMMIT")
                self._note(xid)
        with self._lock:
            self._ended += 1

    def _resolve(self, session: psycopg.Connection[tuple[object, ...]], number: int, chance: random.Random) -> None:
        found = session.execute(
            "SELECT gid, transaction::text FROM pg_prepared_xacts WHERE gid LIKE %s ORDER BY gid LIMIT 1",
            [f"t{number}-%"],
        ).fetchone()
        if found is not None:
            commits = chance.random() < 0.7
            session.execute(f"{'COMMIT' if commits else 'ROLLBACK'} PREPARED '{found[0]}'")
            if commits:
                self._note(int(str(found[1])))

    def _insert(
        self, session: psycopg.Connection[tuple[object, ...]], number: int, chance: random.Random, *, moves: bool = True
    ) -> int:
        row, aid = next(self._ids), chance.randrange(ACCOUNTS // WRITERS) * WRITERS + number
        delta, filler = chance.randint(-100, 100) if moves else 0, chance.randbytes(chance.randint(10, 400)).hex()
        session.execute(
            "INSERT INTO history (id, aid, delta, filler) VALUES (%s, %s, %s, %s)", [row, aid, delta, filler]
        )
        if moves:
            session.execute("UPDATE accounts SET balance = balance + %s WHERE aid = %s", [delta, aid])
        return row

    def _note(self, xid: int) -> None:
        with self._lock:
            self._life.acknowledged.append(Acknowledged(xid, datetime.now(UTC)))
