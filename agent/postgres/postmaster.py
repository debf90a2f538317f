"""Runs PostgreSQL as a child process through recovery and promotion, and stops it.

Nobody can connect while it runs: it listens on a socket in a private directory alone, and rejects everyone there, or
lets in only this user where the restored server is to be looked at (`serve`). It runs no background workers of
extensions. So nothing is written into the restored database but what recovery itself writes. The outcome is read from
what the server logs and from its control file: "started" is not "recovered" (`pg_ctl -w start` succeeds long before),
and recovery that has begun to fail still answers.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import structlog

from agent.domain.control_file import ClusterState, ControlFile
from agent.errors import ConfigError, RestoreFailed
from agent.postgres import end_with_parent
from agent.postgres.data_directory import DataDirectory
from agent.postgres.recovery_log import RecoveryLog, recovery_failure

log = structlog.get_logger()
T = TypeVar("T")

_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")
_VERSION_SECONDS = 30.0
_STOP_SECONDS = 60.0  # for the last restartpoint; recovery that is cut short begins at the one before
_PREPARED_TRANSACTIONS = 100  # at least, where the configuration that said more lives elsewhere; costs some MiB
_LONGEST_LINE = 1 << 16
_HBA_FILE = "pg_hba.conf"
_NOBODY = "local all all reject\n"
_WHOEVER_ENTERS = "local all all trust\n"  # the directory of the socket, which is this user's alone
_SOCKET_PORT = 5432  # part of the socket's name; PGPORT of the server may be anything
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a recovery ended.

    new_timeline: the timeline that promotion began.
    stopped: why replay stopped before the end of WAL, in PostgreSQL's words; None if it did not.
    redo_done_lsn: start of the last record replayed, None if there was nothing to replay.
    restored_lsn: end of the furthest segment that restore_command delivered.
    last_commit_at: time of the last transaction replayed, None if there was none.
    prepared_transactions: prepared transactions that came back in doubt.
    """

    new_timeline: int
    stopped: str | None
    redo_done_lsn: int | None
    restored_lsn: int
    last_commit_at: datetime | None
    prepared_transactions: int


async def find_postgres(major: int, configured: Path | None) -> Path:
    """Return the path of a `postgres` of version `major`.

    Args:
        major: The major version of the data directory.
        configured: The only directory to look in; None looks on PATH and where packages put it.

    Raises:
        ConfigError: There is none, or only of other versions; both are named.
    """
    usual = [Path(f"/usr/lib/postgresql/{major}/bin"), Path(f"/usr/pgsql-{major}/bin")]
    looked_in = [configured] if configured is not None else [*_on_path(), *usual]
    found = []
    for directory in looked_in:
        program = directory / "postgres"
        if not os.access(program, os.X_OK):
            continue
        version = await _major_version(program)
        if version == major:
            return program
        found.append(f"{f'PostgreSQL {version}' if version else 'a program that tells no version'} in {directory}")
    there = " and ".join(found) or f"none in {', '.join(map(str, looked_in))}"
    raise ConfigError(
        f"the base backup is of PostgreSQL {major}, but there is {there}",
        hint=f"Use an image with PostgreSQL {major}, or set PITR_POSTGRES_BIN to the directory of its programs.",
    )


def _on_path() -> list[Path]:
    """Return where the `postgres` on PATH is: of a link, where it leads, for there is what belongs to it."""
    program = shutil.which("postgres")
    return [] if program is None else [Path(program).resolve().parent]


async def _major_version(program: Path) -> int | None:
    """Return what `postgres --version` says, None if it says nothing known."""
    try:
        process = await asyncio.create_subprocess_exec(program, "--version", stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return None
    try:
        async with asyncio.timeout(_VERSION_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        _signal(process, signal.SIGKILL)
    match = _VERSION.search(output.decode("utf-8", "replace"))
    return int(match[1]) if match else None


def refuse_root() -> None:
    """Return if this process is not root, else raise `ConfigError`: PostgreSQL would refuse what root owns."""
    if os.geteuid() == 0:
        raise ConfigError(
            "a restore cannot run as root: PostgreSQL does not, and could not use files that belong to root",
            hint="Run it as the user that PostgreSQL runs as (runAsUser, usually 999 or 26).",
        )


class Postmaster:
    """PostgreSQL in a hydrated data directory, for one recovery."""

    def __init__(self, program: Path, data_directory: Path, environment: Mapping[str, str]) -> None:
        """Make it; nothing is started.

        Args:
            program: `postgres`, of the directory's major version.
            data_directory: Has recovery settings, a signal file and a control file.
            environment: What restore_command needs (`PITR_SOCKET`); the server gets PATH besides, and nothing of the
                agent's own environment, which holds secrets.
        """
        self._program = program
        self._directory = DataDirectory(data_directory)
        self._environment = {"PATH": _SEARCH_PATH, **environment}

    async def recover(self, report: Callable[[RecoveryLog], None]) -> Recovery:
        """Replay, promote, stop. Return when the server has stopped cleanly on its new timeline.

        There is no deadline: replay may take hours. Cancelling stops the server; a later call goes on from there.

        Args:
            report: Is called after every line of the server's log; must return at once.

        Raises:
            RestoreFailed: Recovery ended otherwise; says why, and what to do.
            ConfigError: The server cannot be started, or the control file not be read.
        """
        control = await asyncio.to_thread(self._directory.control_file)
        said = RecoveryLog(control.wal_segment_bytes)
        async with _private_directory(_NOBODY) as private:
            process = await self._start(private, control)
            try:
                exit_code = await self._follow(process, said, report, lambda: _signal(process, signal.SIGINT))
            finally:
                await asyncio.shield(_stop(process, process.communicate))
        if not said.is_ready or exit_code != 0:
            log.error("recovery failed", exit_code=exit_code, last_lines=list(said.last_lines))
            raise recovery_failure(said, exit_code)
        return await self._result(said)

    async def serve(self, use: Callable[[Path, int], Awaitable[T]]) -> T:
        """Start a server that was promoted and stopped, for `use` alone, and stop it; return what `use` returned.

        Args:
            use: Gets the directory of the server's socket, and the port that is part of its name.

        Raises:
            RestoreFailed: The server does not start, or does not stop cleanly.
            ConfigError: It cannot be started.
        """
        control = await asyncio.to_thread(self._directory.control_file)
        said, ready = RecoveryLog(control.wal_segment_bytes), asyncio.Event()
        async with _private_directory(_WHOEVER_ENTERS) as private:
            process = await self._start(private, control)
            following = asyncio.create_task(
                self._follow(process, said, lambda _: None, ready.set), name="follow PostgreSQL's log"
            )
            following.add_done_callback(lambda _: ready.set())
            try:
                await ready.wait()
                if not said.is_ready:
                    raise recovery_failure(said, await following)
                result = await use(private, _SOCKET_PORT)
            finally:
                await asyncio.shield(_stop(process, lambda: asyncio.shield(following)))
        await self._result(said)
        return result

    async def _start(self, private: Path, control: ControlFile) -> Process:
        launcher = [sys.executable, "-I", "-S", end_with_parent.__file__, str(os.getpid())]
        command = [str(self._program), "-D", str(self._directory.path), *self._options(private, control)]
        try:
            return await asyncio.create_subprocess_exec(
                *launcher,
                *command,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for us: we stop the server in order
            )
        except OSError as error:
            raise ConfigError(
                f"{self._program} cannot be started: {error.strerror}", hint="Correct PITR_POSTGRES_BIN."
            ) from error

    def _options(self, private: Path, control: ControlFile) -> list[str]:
        """Settings for this run alone; on the command line they hold over every file in the backup."""
        settings = {
            "data_directory": self._directory.path,  # a backup's postgresql.conf may name the original one
            "hba_file": private / _HBA_FILE,
            "unix_socket_directories": private,
            "port": _SOCKET_PORT,
            "listen_addresses": "",
            "external_pid_file": private / "postmaster.pid",
            "ssl": "off",  # certificates often live outside the data directory
            "huge_pages": "try",
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_line_prefix": "",
            "log_min_messages": "warning",
            "log_error_verbosity": "default",
            "lc_messages": "C",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "restart_after_crash": "off",
            # Unlike other limits it counts without hot_standby: prepared transactions come back into these slots.
            "max_prepared_transactions": max(control.max_prepared_transactions, _PREPARED_TRANSACTIONS),
            # A copy must not act like the original in the moment between promotion and stop.
            "autovacuum": "off",
            "max_logical_replication_workers": "0",
            "max_worker_processes": "0",  # pg_cron and its like are loaded, but do not run
            # What is to be archived stays marked for the server that follows, which has an agent in archive mode.
            "archive_command": "",
        }
        if control.major_version is not None and control.major_version >= 15:
            settings["archive_library"] = ""
        if not (self._directory.path / "postgresql.conf").exists():
            # The configuration lived elsewhere; what the data directory must have is read in any case.
            settings["config_file"] = self._directory.path / "postgresql.auto.conf"
        return [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]

    async def _follow(
        self,
        process: Process,
        said: RecoveryLog,
        report: Callable[[RecoveryLog], None],
        when_ready: Callable[[], object],
    ) -> int:
        """Read the server's log to its end; call `when_ready` once it is. Return its exit code."""
        assert process.stderr is not None
        was_ready = False
        async for line in _lines(process.stderr):
            said.feed(line)
            log.debug("postgresql logged", line=line)
            report(said)
            if said.is_ready and not was_ready:
                was_ready = True
                when_ready()
        return await process.wait()

    async def _result(self, said: RecoveryLog) -> Recovery:
        control = await asyncio.to_thread(self._directory.control_file)
        if control.state is not ClusterState.SHUT_DOWN:
            raise RestoreFailed(
                f"PostgreSQL ended, but its control file says {control.state.name.lower().replace('_', ' ')}",
                hint="Run the restore again.",
            )
        # The command line of this run: `pg_ctl restart` would repeat it.
        await asyncio.to_thread((self._directory.path / "postmaster.opts").unlink, missing_ok=True)
        return Recovery(
            new_timeline=control.timeline,
            stopped=said.stopped,
            redo_done_lsn=said.redo_done_lsn,
            restored_lsn=said.restored_lsn,
            last_commit_at=said.last_commit_at,
            prepared_transactions=said.prepared_transactions,
        )


@contextlib.asynccontextmanager
async def _private_directory(hba: str) -> AsyncIterator[Path]:
    """Make a directory for the socket that only this user may enter, with `hba` as pg_hba.conf."""
    private = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="pitr-"))
    try:
        await asyncio.to_thread((private / _HBA_FILE).write_text, hba)
        yield private
    finally:
        await asyncio.to_thread(shutil.rmtree, private, ignore_errors=True)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of `stream`; one longer than 64 KiB comes in pieces."""
    rest = b""
    while chunk := await stream.read(_LONGEST_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip()
    if rest:
        yield rest.decode("utf-8", "replace")


def _signal(process: Process, number: signal.Signals) -> None:
    """Send a signal, unless the process has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


async def _stop(process: Process, ended: Callable[[], Awaitable[object]]) -> None:
    """End the server if it still runs: in order, or at once after a minute. `ended` returns when its log has."""
    for signal_number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        if process.returncode is not None:
            return
        _signal(process, signal_number)
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await ended()  # reads on: a full pipe would hold the server up
        except TimeoutError:
            log.warning("postgresql did not stop", signal=signal_number.name, seconds=_STOP_SECONDS)
