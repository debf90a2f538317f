"""Throw-away PostgreSQL servers from real binaries, for the demo and the tests."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg

from agent.errors import PostgresError
from agent.lab.postgres_binaries import PostgresBinaries
from agent.lab.privileges import make_directory, unprivileged
from agent.lab.processes import kill_tree
from agent.lab.waiting import wait_until

_PORT = 5432  # of a unix socket in a directory of its own: it need not be free
_LONGEST_SOCKET_DIRECTORY = 107 - len(f"/.s.PGSQL.{_PORT}.lock")  # unix(7): a socket's path has at most 107 bytes
_INITDB_SECONDS = 300
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}  # postgres, "Shutdown"
_LOG_TAIL_LINES = 15


class PostgresCluster:
    """One database cluster in `data_directory`, and its server while it runs. The methods block.

    The server is this process's child, listens on a unix socket only and lets everyone in as `postgres`. Beside the
    data directory lie `<its name>.run`, where the socket is, and `<its name>.log`, what the server said.

    environment: variables that the server, and so the hooks it calls, get besides this process's own.

    As a context manager it kills a server that still runs.
    """

    def __init__(
        self, data_directory: Path, binaries: PostgresBinaries, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.data_directory = data_directory
        self.binaries = binaries
        self.environment = dict(environment or {})
        self.socket_directory = data_directory.with_name(f"{data_directory.name}.run")
        self.port = _PORT
        self.log_file = data_directory.with_name(f"{data_directory.name}.log")
        self._server: subprocess.Popen[bytes] | None = None
        if len(os.fsencode(self.socket_directory)) > _LONGEST_SOCKET_DIRECTORY:
            raise PostgresError(f"{data_directory} is too long a path for a unix socket beside it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None if the server does not run."""
        return self._server.pid if self._server is not None and self._server.poll() is None else None

    @property
    def conninfo(self) -> str:
        """How libpq reaches the server as superuser."""
        return f"host={self.socket_directory} port={self.port} user=postgres dbname=postgres"

    @property
    def client_environment(self) -> dict[str, str]:
        """The libpq and agent settings that name this server and its data directory."""
        return {
            "PGHOST": str(self.socket_directory),
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
            "PGDATA": str(self.data_directory),
        }

    def initdb(self, *options: str, segment_megabytes: int = 16, checksums: bool = True) -> None:
        """Create the database cluster, in UTF8 and the C locale. `options` go to initdb as they are.

        Raises:
            PostgresError: initdb failed; the message has what it said.
        """
        make_directory(self.data_directory)
        how = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        how += [f"--wal-segsize={segment_megabytes}", *(["--data-checksums"] if checksums else []), *options]
        self.run("initdb", f"--pgdata={self.data_directory}", *how, seconds=_INITDB_SECONDS)

    def configure(self, **settings: str | int | bool) -> None:
        """Append `settings` to postgresql.conf; they hold from the next start, and over what is there."""
        values = {name: str(value).replace("'", "''") for name, value in settings.items()}
        with (self.data_directory / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in values.items())

    def start(self, *options: str, seconds: float = 120, wait: bool = True) -> None:
        """Start the server with `options` of postgres (`-c`, `NAME=VALUE`); return when it takes connections.

        Without `wait` it returns at once: `wait_until_ready` is the caller's.

        Raises:
            PostgresError: It did not come up within `seconds`; the message has the end of its log.
        """
        assert self.pid is None, "the server runs"
        make_directory(self.socket_directory)
        flags = ["-D", str(self.data_directory), "-p", str(self.port), "-k", str(self.socket_directory), "-h", ""]
        with self.log_file.open("ab") as log:
            self._server = subprocess.Popen(
                unprivileged([self.binaries["postgres"], *flags, *options]),
                cwd=self.socket_directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for us, we stop the server in order
            )
        if wait:
            self.wait_until_ready(seconds=seconds)

    def wait_until_ready(self, *, seconds: float = 120) -> None:
        """Return when the server takes connections (in recovery: when it is a hot standby, or after it).

        Raises:
            PostgresError: It ended, or `seconds` went by.
        """
        try:
            wait_until(lambda: self.pid is None or self._is_ready(), seconds=seconds, what="PostgreSQL to start")
        except TimeoutError as error:
            self.kill()
            raise PostgresError(f"{error}:\n{self.log_tail()}") from error
        if self.pid is None:
            raise PostgresError(f"PostgreSQL did not start:\n{self.log_tail()}")

    def _is_ready(self) -> bool:
        """Read the last line of postmaster.pid. Source: LOCK_FILE_LINE_PM_STATUS in PostgreSQL's utils/pidfile.h."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")
        return False

    def wait_until_ended(self, *, seconds: float = 60) -> int:
        """Return the exit code of a server that ends by itself, as one does whose recovery cannot go on.

        Raises:
            PostgresError: It still runs after `seconds`.
        """
        assert self._server is not None, "the server was never started"
        try:
            return self._server.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise PostgresError(f"PostgreSQL still runs after {seconds:g} s:\n{self.log_tail()}") from error

    def stop(self, mode: str = "fast", *, seconds: float = 60) -> None:
        """Stop the server (`smart`, `fast` or `immediate`) and return when it has ended; no error if it does not run.

        Raises:
            PostgresError: It still ran after `seconds`; then it is killed.
        """
        if self.pid is None:
            return
        os.kill(self.pid, _STOP_SIGNALS[mode])
        try:
            self.wait_until_ended(seconds=seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the postmaster and all its processes by SIGKILL, as the loss of their node would; return when gone."""
        if self._server is not None:
            kill_tree(self._server)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it."""
        self.stop(mode)
        self.start()

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a session as superuser, in autocommit mode unless `options` of psycopg.connect say otherwise."""
        return psycopg.connect(self.conninfo, **{"autocommit": True, "connect_timeout": 60, **options})

    def execute(self, *statements: str) -> None:
        """Run SQL statements, each in a transaction of its own."""
        with self.connect() as session:
            for statement in statements:
                session.execute(statement)

    def query(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows that `statement` gives."""
        with self.connect() as session:
            return session.execute(statement, parameters or None).fetchall()

    def value(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """Return the first column of the first row that `statement` gives."""
        return self.query(statement, parameters)[0][0]

    def switch_wal(self) -> str:
        """Switch to a new WAL segment; return the name of the one that was ended, now to be archived."""
        name: str = self.value("SELECT pg_walfile_name(pg_switch_wal())")
        return name

    def wait_until_archived(self, segment: str, *, seconds: float = 60) -> None:
        """Return when archive_command has succeeded for the finished WAL segment `segment`.

        Raises:
            PostgresError: `seconds` went by; the message has the end of its log.
        """
        ready = self.data_directory / "pg_wal" / "archive_status" / f"{segment}.ready"
        try:
            wait_until(lambda: not ready.exists(), seconds=seconds, what=f"WAL segment {segment} to be archived")
        except TimeoutError as error:
            raise PostgresError(f"{error}:\n{self.log_tail()}") from error

    def run(self, program: str, *arguments: str, seconds: float = 60, stdin: str = "") -> str:
        """Run one of PostgreSQL's programs with this server's settings; return what it printed.

        Raises:
            PostgresError: It failed, or took longer than `seconds`; the message has what it said.
            ConfigError: These binaries do not have it.
        """
        try:
            done = subprocess.run(
                unprivileged([self.binaries[program], *arguments]),
                cwd=self.data_directory.parent,
                env=self._environment(),
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise PostgresError(f"{program}: {error}\n{getattr(error, 'stdout', '')}") from error
        return done.stdout

    def log_text(self) -> str:
        """Return all that the server has said, "" before its first start."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log_text().splitlines()[-_LOG_TAIL_LINES:])

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return {**inherited, "LC_ALL": "C", "TZ": "UTC", **self.client_environment, **self.environment}
