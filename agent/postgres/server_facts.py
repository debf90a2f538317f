"""What `pitr check` asks a server: its settings, the rights of the role, and to finish a WAL segment."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString

from agent.domain.lsn import parse_lsn
from agent.domain.server_checks import RECOVERY_SETTINGS_FILE, SETTINGS, ServerFacts, functions_needed
from agent.domain.wal import segment_name

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

    Connection = psycopg.AsyncConnection[TupleRow]

_WHO = """
    SELECT (SELECT system_identifier FROM pg_control_system()), pg_is_in_recovery(), current_database(), current_user,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
           pg_has_role(current_user, 'pg_read_all_settings', 'USAGE')
"""
_SETTINGS = """
    SELECT name, setting, pending_restart, coalesce(sourcefile LIKE '%%/' || %s, false)
    FROM pg_settings WHERE name = ANY(%s)
"""
# What was recorded and is not known any more is another version, too. Source: CheckMyDatabase() in postinit.c.
_SORTS_OTHERWISE = """
    SELECT datname FROM pg_database WHERE datallowconn AND datcollversion IS NOT NULL
    AND datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) ORDER BY datname
"""
_MAY_EXECUTE = "SELECT each, has_function_privilege(each, 'EXECUTE') FROM unnest(%s::text[]) AS each"
# A record of our own: PostgreSQL does not switch away from a segment that nothing was written to.
_EMIT = "SELECT pg_logical_emit_message(false, 'pitr', 'check')"
_SWITCH = """
    SELECT pg_switch_wal()::text, (SELECT timeline_id FROM pg_control_checkpoint()),
           (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size')
"""
_ARCHIVER = "SELECT coalesce(last_archived_wal, ''), coalesce(last_failed_wal, ''), failed_count FROM pg_stat_archiver"


@dataclass(frozen=True, slots=True)
class ArchiverState:
    """What PostgreSQL's archiver has done: names of WAL files, "" for none, and how many calls failed."""

    last_archived: str
    last_failed: str
    failures: int


async def read_facts(connection: "Connection") -> ServerFacts:
    """Return what the server says of itself to this role. Raises psycopg's errors."""
    version = connection.info.server_version
    ((identifier, in_recovery, database, role, is_superuser, reads_settings),) = await _rows(connection, _WHO)
    settings = await _rows(connection, _SETTINGS, [RECOVERY_SETTINGS_FILE, list(SETTINGS)])
    otherwise = await _rows(connection, _SORTS_OTHERWISE) if version >= 150000 else []
    may_execute = await _rows(connection, _MAY_EXECUTE, [list(functions_needed(version // 10_000))])
    return ServerFacts(
        version_num=version,
        system_identifier=identifier % (1 << 64),  # SQL has no unsigned bigint
        in_recovery=in_recovery,
        database=database,
        role=role,
        is_superuser=is_superuser,
        reads_settings=reads_settings,
        may_execute=dict(may_execute),
        settings={name: setting for name, setting, _, _ in settings},
        pending_restart=frozenset(name for name, _, is_pending, _ in settings if is_pending),
        sorts_otherwise=tuple(name for (name,) in otherwise),
        set_by_restore=frozenset(name for name, _, _, is_ours in settings if is_ours),
    )


async def finish_segment(connection: "Connection") -> str:
    """Have PostgreSQL end its WAL segment; return its name. Raises psycopg's errors."""
    await _rows(connection, _EMIT)
    ((lsn, timeline, segment_bytes),) = await _rows(connection, _SWITCH)
    return segment_name(timeline, parse_lsn(lsn) - 1, segment_bytes)


async def read_archiver(connection: "Connection") -> ArchiverState:
    """Return what PostgreSQL's archiver has done. Raises psycopg's errors."""
    ((archived, failed, failures),) = await _rows(connection, _ARCHIVER)
    return ArchiverState(archived, failed, failures)


async def _rows(connection: "Connection", query: LiteralString, parameters: Any = ()) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query, parameters)).fetchall()
