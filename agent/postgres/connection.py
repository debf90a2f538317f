"""Speaks to a running PostgreSQL server, 13 to 18. The only importer of psycopg: its errors end here.

Every call has a deadline. Sessions have `search_path=pg_catalog`, so that no object of another schema is taken for one
of PostgreSQL's, and no timeout of the server's, the role's or the database's can end them.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, LiteralString

from agent.domain.lsn import parse_lsn
from agent.domain.server_checks import ServerFacts
from agent.domain.timeline import Stretch
from agent.errors import BackupElsewhere, PostgresError
from agent.ports import BackupSession, BackupStop, NoSummaries, ServerInfo
from agent.postgres.server_facts import ArchiverState, finish_segment, read_archiver, read_facts
from agent.postgres.wal_summaries import SUMMARIES_SECONDS, read_changed_blocks
from agent.settings import PostgresSettings

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

    from agent.domain.wal_summaries import ChangedBlocks

_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30.0
# The start waits for a checkpoint, the stop for the WAL up to it to be flushed.
_START_SECONDS = 3600.0
# Each of two, should one have begun, takes `checkpoint_timeout`: a day at most.
_SPREAD_START_SECONDS = 2 * 86_400.0
_STOP_SECONDS = 300.0

# Each exists from some version on; a backup may last longer than any of them.
_TIMEOUTS_OFF = """
    SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout',
                   'idle_session_timeout', 'transaction_timeout')
"""

# In recovery the timeline being replayed is not in sight of SQL; that of what was last flushed is the nearest.
_SERVER = """
    SELECT current_setting('server_version_num')::int,
           (SELECT system_identifier FROM pg_control_system()),
           pg_is_in_recovery(),
           CASE WHEN pg_is_in_recovery() THEN (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline)
                                              FROM pg_control_checkpoint() c, pg_control_recovery() r)
                ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint END,
           pg_postmaster_start_time(),
           (SELECT redo_lsn::text FROM pg_control_checkpoint()),
           current_setting('data_directory'),
           (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
           current_setting('archive_mode'),
           current_setting('archive_command'),
           coalesce(current_setting('archive_library', true), ''),
           current_setting('wal_level'),
           current_setting('wal_log_hints')::bool,
           (SELECT max(pg_collation_actual_version(oid)) FROM pg_collation WHERE collprovider = 'c'),
           ARRAY(SELECT setting FROM pg_settings WHERE name IN ('config_file', 'hba_file', 'ident_file')
                 AND NOT starts_with(setting, current_setting('data_directory') || '/') ORDER BY name)
"""

# The label as the bytes the server holds, whatever the client's encoding would make of it.
_STOPPED = """
    SELECT lsn::text, convert_to(labelfile, getdatabaseencoding()), convert_to(spcmapfile, getdatabaseencoding())
    FROM """

# Of all agents; "pitr" in ASCII.
_BACKUP_LOCK = 0x70697472

_GRANTS = (
    "GRANT pg_read_all_settings TO the role, and EXECUTE on pg_backup_start, pg_backup_stop (before PostgreSQL 15 "
    "pg_start_backup, pg_stop_backup) and pg_switch_wal."
)
_HINT_BY_STATE = {
    "28P01": "Correct PGUSER and PGPASSWORD.",
    "28000": "Allow this user and address in pg_hba.conf, or correct PGUSER.",
    "3D000": "Correct PGDATABASE.",
    "42501": _GRANTS,
    "53300": "Raise max_connections or reserve a connection for this role.",
    "57P01": "The server is stopping, or an administrator ended the session.",
    "57P02": "The server crashed and restarts; see its log.",
    "57P03": "The server is starting or stopping; try again when it accepts connections.",
}
# libpq gives no SQLSTATE for a connection that could not be made, only words.
_HINT_BY_WORDS = (
    ("password", "Correct PGUSER and PGPASSWORD."),
    ("authentication", "Correct PGUSER and PGPASSWORD, or the method in pg_hba.conf."),
    ("pg_hba.conf", "Allow this user and address in pg_hba.conf."),
    ("translate host name", "Correct PGHOST."),
    ("resolve host", "Correct PGHOST."),
    ("Name or service not known", "Correct PGHOST."),
    ("starting up", "Try again when the server accepts connections."),
    ("shutting down", "Try again when the server accepts connections."),
    ("too many", "Raise max_connections or reserve a connection for this role."),
    ("does not exist", "Correct PGUSER and PGDATABASE."),
    ("No such file", "Share the socket's directory with this container, or correct PGHOST and PGPORT."),
    ("Permission denied", "Let the agent's user enter the socket's directory."),
    ("refused", "Check that PostgreSQL runs, and PGHOST and PGPORT."),
)
_HINT = "See the server's log; check PGHOST, PGPORT and PGUSER."


def postgres_error(error: "psycopg.Error", doing: str) -> PostgresError:
    """Return our error for psycopg's: what was being done, the server's words on one line, and the next step."""
    words = error.diag.message_primary or str(error) or type(error).__name__
    hint = _HINT_BY_STATE.get(error.sqlstate or "")
    if hint is None and error.sqlstate is None:
        hint = next((hint for word, hint in _HINT_BY_WORDS if word in words), None)
    return PostgresError(f"cannot {doing}: {' '.join(words.split())}", hint=hint or _HINT)


@asynccontextmanager
async def errors_of(doing: str, seconds: float) -> AsyncIterator[None]:
    """Turn psycopg's errors, and the lapse of `seconds`, into ours."""
    import psycopg  # 9 MiB: not for an agent that only archives

    try:
        async with asyncio.timeout(seconds):
            yield
    except psycopg.Error as error:
        raise postgres_error(error, doing) from error
    except TimeoutError as error:
        raise PostgresError(f"cannot {doing}: PostgreSQL did not answer within {seconds:g} s", hint=_HINT) from error


class PostgresServer:
    """The server that `settings` name; implements `Postgres`. Every call but those of a session connects anew."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings

    @asynccontextmanager
    async def _connection(self, purpose: str) -> AsyncIterator["psycopg.AsyncConnection[TupleRow]"]:
        import psycopg

        settings = self._settings
        where = f"connect to PostgreSQL at {settings.host}:{settings.port} as {settings.user}"
        async with errors_of(where, 2 * _CONNECT_SECONDS):
            connection = await psycopg.AsyncConnection.connect(
                host=settings.host,
                port=settings.port,
                user=settings.user,
                password=settings.password.reveal() if settings.password else None,
                dbname=settings.database,
                application_name=f"pitr {purpose}",
                options="-c search_path=pg_catalog -c default_transaction_read_only=on",
                autocommit=True,
                prepare_threshold=None,
                connect_timeout=_CONNECT_SECONDS,
                keepalives=1,
                keepalives_idle=30,
                keepalives_interval=10,
                keepalives_count=3,
            )
        try:
            await _rows(connection, "prepare a session", _TIMEOUTS_OFF)
            yield connection
        finally:
            await connection.close()

    async def server(self) -> ServerInfo:
        """Ask the server for its identity and the settings that archiving depends on.

        Raises:
            PostgresError: It cannot be reached, or the role may not ask.
        """
        async with self._connection("status") as connection:
            (row,) = await _rows(connection, "ask PostgreSQL for its settings", _SERVER)
        version, identifier, in_recovery, timeline, started_at, redo, directory, segment_bytes, *archiving = row
        archive_mode, archive_command, archive_library, wal_level, wal_log_hints, libc, config_outside = archiving
        return ServerInfo(
            version_num=version,
            system_identifier=identifier % (1 << 64),  # SQL has no unsigned bigint
            in_recovery=in_recovery,
            timeline=timeline,
            data_directory=directory,
            segment_bytes=segment_bytes,
            archive_mode=archive_mode,
            archive_command=archive_command,
            archive_library=archive_library,
            wal_level=wal_level,
            wal_log_hints=wal_log_hints,
            started_at=started_at,
            redo_lsn=parse_lsn(redo),
            libc=libc,
            config_outside=tuple(config_outside),
        )

    @asynccontextmanager
    async def backup_session(self) -> AsyncIterator[BackupSession]:
        """Open a session of its own with every timeout off; leaving the context closes it, which aborts a backup.

        Raises:
            PostgresError: It cannot be opened.
        """
        async with self._connection("base backup") as connection:
            yield _Session(connection)

    @asynccontextmanager
    async def only_backup(self) -> AsyncIterator[None]:
        """Hold the advisory lock that makes this the only base backup of the server, in a session of its own.

        A session that dies releases it: a killed agent leaves nothing behind. Works on a standby, for that alone.
        Source: PostgreSQL docs, "Advisory Locks" and "Hot Standby".

        Raises:
            BackupElsewhere: Another session holds it.
            PostgresError: The server cannot be reached.
        """
        async with self._connection("backup lock") as connection:
            query: LiteralString = "SELECT pg_try_advisory_lock(%s)"
            ((is_ours,),) = await _rows(connection, "lock base backups", query, [_BACKUP_LOCK])
            if not is_ours:
                raise BackupElsewhere(
                    "another agent is taking a base backup of this server", hint="Wait until it has ended."
                )
            try:
                yield
            finally:  # the server sees only after a while that a session has ended
                with suppress(PostgresError):
                    await _rows(connection, "unlock base backups", "SELECT pg_advisory_unlock(%s)", [_BACKUP_LOCK])

    async def switch_wal(self) -> int:
        """Switch to a new WAL segment; return the LSN at the end of the old one."""
        async with self._connection("WAL switch") as connection:
            ((lsn,),) = await _rows(connection, "switch to a new WAL segment", "SELECT pg_switch_wal()::text")
            return parse_lsn(lsn)

    async def facts(self) -> ServerFacts:
        """Ask the server what `pitr check` looks at; a role without rights is told less, without an error.

        Raises:
            PostgresError: It cannot be reached.
        """
        async with self._connection("check") as connection, errors_of("ask for settings and rights", _ANSWER_SECONDS):
            return await read_facts(connection)

    async def finish_segment(self) -> str:
        """Write a record and have the segment that holds it ended; return the segment's name.

        Raises:
            PostgresError: The role may not, or the server is a standby.
        """
        async with self._connection("check") as connection, errors_of("finish a WAL segment", _ANSWER_SECONDS):
            return await finish_segment(connection)

    async def archiver(self) -> ArchiverState:
        """Return what PostgreSQL's archiver has done; raises `PostgresError`."""
        async with self._connection("check") as connection, errors_of("ask for the archiver", _ANSWER_SECONDS):
            return await read_archiver(connection)

    async def changed_blocks(
        self, path: Sequence[Stretch], start_lsn: int, end_lsn: int
    ) -> "ChangedBlocks | NoSummaries":
        """As `Postgres`; see `agent.postgres.wal_summaries`."""
        async with (
            self._connection("WAL summaries") as connection,
            errors_of("read the WAL summaries", SUMMARIES_SECONDS),
        ):
            return await read_changed_blocks(connection, path, start_lsn, end_lsn)


class _Session:
    """Implements `BackupSession`. Source: PostgreSQL docs, "Making a Base Backup Using the Low Level API"."""

    def __init__(self, connection: "psycopg.AsyncConnection[TupleRow]") -> None:
        self._connection = connection
        self._functions_renamed = connection.info.server_version >= 150000

    async def start(self, label: str, *, fast: bool = True) -> int:
        query: LiteralString = (
            "SELECT pg_backup_start(label => %s, fast => %s)::text"
            if self._functions_renamed
            else "SELECT pg_start_backup(label => %s, fast => %s, exclusive => false)::text"
        )
        seconds = _START_SECONDS if fast else _SPREAD_START_SECONDS
        ((lsn,),) = await _rows(self._connection, "start a base backup", query, [label, fast], seconds)
        return parse_lsn(lsn)

    async def stop(self) -> BackupStop:
        query: LiteralString = _STOPPED + (
            "pg_backup_stop(wait_for_archive => false)"
            if self._functions_renamed
            else "pg_stop_backup(exclusive => false, wait_for_archive => false)"
        )
        ((lsn, label, spaces),) = await _rows(self._connection, "stop the base backup", query, (), _STOP_SECONDS)
        return BackupStop(parse_lsn(lsn), bytes(label), bytes(spaces or b""))

    async def ping(self) -> None:
        await _rows(self._connection, "keep the base backup's session", "SELECT 1")


async def _rows(
    connection: "psycopg.AsyncConnection[TupleRow]",
    doing: str,
    query: LiteralString,
    parameters: Sequence[Any] = (),
    seconds: float = _ANSWER_SECONDS,
) -> list["TupleRow"]:
    async with errors_of(doing, seconds):
        cursor = await connection.execute(query, parameters)
        return await cursor.fetchall()
