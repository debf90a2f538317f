"""The whole story on real parts: a database archives, a table is dropped, and it comes back as it was just before.

Nothing is faked: PostgreSQL calls the hooks, the agent stores in an S3 server, and the steps are the commands that
people use.
"""

import asyncio
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
from rich.console import Console
from rich.table import Table

from agent.errors import AgentError
from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.demo_stage import Stage
from agent.lab.narrator import Narrator
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import make_temporary_directory
from agent.lab.processes import kill_tree
from agent.outside import outside
from agent.settings import load_settings

TABLES = ("customers", "orders", "payments")
LOST = "orders"
_SCHEMA = (
    "CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL)",
    "CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, item text NOT NULL, euros numeric NOT NULL)",
    """CREATE TABLE payments (id bigserial PRIMARY KEY, customer int NOT NULL, euros numeric NOT NULL,
       paid_at timestamptz NOT NULL DEFAULT clock_timestamp())""",
)
_ROWS = (
    "INSERT INTO customers SELECT n, 'customer ' || n FROM generate_series(1, 20000) AS n",
    """INSERT INTO orders SELECT n, 1 + n % 20000, md5(n::text), round((random() * 1000)::numeric, 2)
       FROM generate_series(1, 150000) AS n""",
)
_PAYMENT = """\\set customer random(1, 20000)
INSERT INTO payments (customer, euros) VALUES (:customer, round((random() * 100)::numeric, 2));
"""
_IN_REAL_LIFE = (
    "[dim]postgresql.conf[/] archive_mode = on",
    "                archive_command = '/usr/local/bin/wal-archive.sh %p %f'",
    "[dim]beside it[/]       pitr agent",
    "[dim]with settings[/]   PGDATA, WALG_S3_PREFIX=s3://BUCKET/PATH, AWS_...",
    "[dim]a base backup[/]   pitr backup now",
    "[dim]after a mistake[/] pitr wal around TIME",
    "                TARGET_XID=... TARGET_INCLUSIVE=false PGDATA=/empty AUTO_START=true pitr restore",
)
_LOAD_SECONDS, _MORE_SECONDS = 3, 1
_COMMAND_SECONDS = 90
_LOG_TAIL_LINES = 20
_REPORT = "Report it with all that is above."


def run_demo(console: Console, *, keep: bool) -> None:
    """Tell the whole story on `console`; return when every proof held.

    Nothing is left of it, however it ends; with `keep`, and if it went well, everything keeps running.

    Raises:
        AgentError: A part failed, or a proof did not hold; the ends of the logs have been shown.
        KeyboardInterrupt: It was interrupted (SIGINT), or told to end (SIGTERM, SIGHUP).
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    stage = Stage(make_temporary_directory("pitr-demo-"))
    kept = False
    try:
        Demo(stage, console).run(keep=keep)
        kept = keep
    except (AgentError, OSError, psycopg.Error, subprocess.SubprocessError) as error:
        _show_logs(stage, console)
        raise AgentError(
            f"the demo broke off: {(str(error) or repr(error)).splitlines()[0].rstrip(':')}", hint=_REPORT
        ) from error
    finally:
        if not kept:
            _end(stage)


def _end(stage: Stage) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave half of it running
    stage.end()


def _show_logs(stage: Stage, console: Console) -> None:
    for log in stage.logs():
        lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        console.print(f"\n[bold]the end of {log}[/]", soft_wrap=True)
        console.print("\n".join(lines), markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one table holds: how many rows, and the MD5 digest of all of them in the order of their keys."""

    rows: int
    digest: str


def fingerprints(cluster: PostgresCluster) -> dict[str, Fingerprint | None]:
    """Return what each of `TABLES` holds, None for one that does not exist."""
    found: dict[str, Fingerprint | None] = {}
    for table in TABLES:
        exists = cluster.value("SELECT to_regclass(%s) IS NOT NULL", [table])
        digest = "md5(coalesce(string_agg(t::text, ' ' ORDER BY id), ''))"
        statement = f"SELECT count(*), {digest} FROM {table} AS t"  # noqa: S608 - the names are those above
        found[table] = Fingerprint(*cluster.query(statement)[0]) if exists else None
    return found


class Demo:
    """The story, told on `console`."""

    def __init__(self, stage: Stage, console: Console) -> None:
        self._stage = stage
        self._tell = Narrator(console)

    def run(self, *, keep: bool) -> None:
        """Tell the story; at its end say how to go on: in real life, or with `keep` here.

        Raises:
            AgentError: A part failed, or a proof did not hold.
        """
        started = time.monotonic()
        self._tell.title(
            "A database, a mistake, and the way back",
            f"PostgreSQL, an S3 server and the agent run on this machine alone, in {self._stage.directory}.",
        )
        self._start()
        self._load()
        before = self._go_on()
        self._drop()
        target = self._find_the_moment()
        self._restore(target)
        self._prove(before)
        self._show_bucket()
        seconds = time.monotonic() - started
        self._tell.title(
            "[green]Every proof held[/]", f"{seconds:.1f} s from an empty directory to here. In real life:"
        )
        self._tell.lines(*_IN_REAL_LIFE)
        if keep:
            self._tell_what_is_kept()
        else:
            self._tell.say("\nAll of it is removed now; pitr demo --keep leaves it running, to look at.", style="dim")

    def _start(self) -> None:
        stage, tell = self._stage, self._tell
        tell.chapter("A database that archives", "PostgreSQL hands every finished WAL segment to the agent beside it.")
        with tell.step("S3 server started, with an empty bucket"):
            stage.start_s3()
        with tell.step(f"PostgreSQL {stage.binaries.major} initialised"):
            stage.initialise()
        with tell.step("agent started: pitr agent"):
            stage.agent.start()
        with tell.step("PostgreSQL started, with these two lines in postgresql.conf"):
            stage.source.start()
        tell.lines("archive_mode = on", "archive_command = '/usr/local/bin/wal-archive.sh %p %f'")

    def _load(self) -> None:
        tell = self._tell
        tell.chapter(
            "Data, and a base backup", "From a base backup and the WAL after it, every later moment can be had."
        )
        with tell.step("20,000 customers and 150,000 orders loaded"):
            self._stage.source.execute(*_SCHEMA, *_ROWS)
        self._pitr("backup", "now", settings=self._stage.agent.settings)

    def _go_on(self) -> dict[str, Fingerprint | None]:
        tell = self._tell
        tell.chapter("Life goes on", "Transactions commit, and meanwhile their WAL is archived.")
        self._pay(_LOAD_SECONDS)
        with tell.step("rows counted, and a checksum taken of every table"):
            return fingerprints(self._stage.source)

    def _drop(self) -> None:
        tell = self._tell
        tell.chapter("The mistake", "Someone types into the wrong window. Nobody notices, and payments go on.")
        with tell.step(f"[red]DROP TABLE {LOST}[/]"):
            self._stage.source.execute(f"DROP TABLE {LOST}")
        self._pay(_MORE_SECONDS)

    def _pay(self, seconds: int) -> None:
        """Commit payments from several sessions, with pgbench."""
        source = self._stage.source
        count = "SELECT count(*) FROM payments"
        already, started = source.value(count), time.monotonic()
        with self._tell.waiting("payments committed"):
            how = [f"--time={seconds}", "--client=4", "--jobs=2", "--no-vacuum", "--file=-", "postgres"]
            source.run("pgbench", *how, stdin=_PAYMENT)
        self._tell.done(f"{source.value(count) - already:,} payments committed", time.monotonic() - started)

    def _find_the_moment(self) -> dict[str, str]:
        """Return the settings that restore to just before the mistake, as `pitr wal around` prints them."""
        source, tell, settings = self._stage.source, self._tell, self._stage.agent.settings
        noticed = datetime.now(UTC)
        tell.chapter(
            "Finding the moment", "Somebody notices, and knows only about when. The archive knows what happened then."
        )
        with tell.step("PostgreSQL told to finish its WAL segment; segment archived"):
            source.wait_until_archived(source.switch_wal())
        self._pitr("window", settings=settings)
        said = self._pitr("wal", "around", f"{noticed:%Y-%m-%dT%H:%M:%SZ}", "--limit", "4", settings=settings)
        found = re.search(r"TARGET_XID=\d+ TARGET_INCLUSIVE=false", said)
        if found is None:
            raise AgentError("pitr wal around did not find the DROP TABLE")
        target = dict(setting.split("=") for setting in found[0].split())
        self._pitr("restore", "--plan", settings=self._stage.restore_settings(target), shown=tuple(target))
        return target

    def _restore(self, target: Mapping[str, str]) -> None:
        tell = self._tell
        tell.chapter(
            "Back to just before",
            "Into an empty directory: the damaged database stays as it is. The agent chooses the backup, unpacks it and"
            " leads PostgreSQL through the WAL up to the moment.",
        )
        settings = self._stage.restore_settings(target)
        self._pitr("restore", settings=settings, shown=(*target, "PGDATA", "AUTO_START"))
        with tell.step("restored database started"):
            self._stage.restored.start()

    def _prove(self, before: Mapping[str, Fingerprint | None]) -> None:
        tell = self._tell
        tell.chapter("Proof", "Every row is there as it was, and nothing that came after the moment.")
        with tell.step("rows counted and checksums taken again, in both databases"):
            damaged, restored = fingerprints(self._stage.source), fingerprints(self._stage.restored)
        table = _table("table", "rows before", "damaged", "restored", "checksum")
        for name in TABLES:
            same = "[green]as before[/]" if restored[name] == before[name] else "[red]DIFFERS[/]"
            table.add_row(name, *(_rows(found[name]) for found in (before, damaged, restored)), same)
        tell.table(table)
        if restored != before:
            raise AgentError("the restored database is not what it was before the mistake")
        if damaged[LOST] is not None or damaged["payments"] == before["payments"]:
            raise AgentError("the database was not damaged, so nothing is proven")

    def _show_bucket(self) -> None:
        tell = self._tell
        tell.chapter("What the bucket holds", "In the layout of WAL-G 3.x, which can read all of it.")
        sizes, counts = asyncio.run(_stored(self._stage.repository))
        table = _table("folder", "objects", "stored")
        for folder in sorted(sizes):
            table.add_row(f"{folder}/", str(counts[folder]), f"{sizes[folder] / (1 << 20):.1f} MiB")
        tell.table(table)

    def _tell_what_is_kept(self) -> None:
        stage, tell = self._stage, self._tell
        environment, stop = stage.leave_scripts()
        tell.title("Everything keeps running", "To look at it:")
        tell.lines(
            f". {environment}",
            "pitr backup list",
            "psql    [dim]# the damaged database[/]",
            f"psql -h {stage.restored.socket_directory}    [dim]# the restored one[/]",
            f"curl {stage.agent.url}/metrics",
            f"tail {stage.agent.log_file}",
        )
        tell.say("To end it and remove all of it:")
        tell.lines(f"sh {stop}")

    def _pitr(self, *arguments: str, settings: Mapping[str, str], shown: tuple[str, ...] = ()) -> str:
        """Run `pitr` in this terminal, as a person would, showing the settings that matter; return what it printed."""
        name = f"pitr {' '.join(arguments)}"
        self._tell.command(" ".join([*(f"{key}={shlex.quote(settings[key])}" for key in shown), name]))
        self._tell.console.file.flush()
        started = time.monotonic()
        # Its result goes through us, to be indented; its progress and its errors straight to the terminal.
        command = pitr_command(*arguments)
        environment = {**agent_environment(settings), "COLUMNS": str(self._tell.output_width)}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        try:
            said, _ = process.communicate(timeout=_COMMAND_SECONDS)
        finally:
            kill_tree(process)
        self._tell.output(said)
        if process.returncode != 0:
            raise AgentError(f"{name} ended with exit code {process.returncode}")
        self._tell.done(name, time.monotonic() - started)
        return said


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _rows(found: Fingerprint | None) -> str:
    return "[red]gone[/]" if found is None else f"{found.rows:,}"


async def _stored(repository: Mapping[str, str]) -> tuple[Counter[str], Counter[str]]:
    """Return bytes and number of the repository's objects by their topmost folder."""
    sizes, counts = Counter[str](), Counter[str]()
    async with outside(load_settings(repository)) as opened:
        async for info in opened.store.list(""):
            folder = info.key.split("/")[0]
            sizes[folder] += info.size
            counts[folder] += 1
    return sizes, counts
