"""Checks of a restored server: a user's queries, and PostgreSQL's own programs."""

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import ConfigError, PostgresError
from agent.postgres.connection import errors_of

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGresult

_CONNECT_SECONDS = 30.0
_SHOWN_CHARACTERS = 200
_BOOL = 16
_NUMBERS = frozenset({20, 21, 23, 26, 700, 701, 790, 1700})  # Source: PostgreSQL's src/include/catalog/pg_type.dat
_SESSION = "-c default_transaction_read_only=on -c statement_timeout=0 -c lock_timeout=0"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it is called, whether it passed, and what was answered, or is wrong."""

    name: str
    passed: bool
    said: str


async def run_queries(sql: str, *, host: Path, port: int, user: str, database: str, seconds: float) -> list[Check]:
    """Run the queries of `sql`, read-only, in one session; return a check for each that answers with columns.

    It passes if its first row's first column is neither false, nor zero, nor null. A check is named by its number and
    the name of that column. If a query fails, that is the only check: the server ends the others with it.

    Raises:
        PostgresError: The server cannot be reached, or has not answered within `seconds`.
    """
    import psycopg

    async with errors_of("connect to the restored server", _CONNECT_SECONDS):
        connection = await psycopg.AsyncConnection.connect(
            host=str(host), port=port, user=user, dbname=database, options=_SESSION, autocommit=True,
            application_name="pitr validation",
        )  # fmt: skip
    try:
        async with errors_of("run PITR_VALIDATE_SQL", seconds), connection.cursor() as cursor:
            try:
                # Without parameters all of it goes to the server at once, which knows where a query ends.
                await cursor.execute(sql.encode())
            except psycopg.Error as error:
                if connection.broken:
                    raise
                return [Check("queries", passed=False, said=_told(error, sql))]
            checks: list[Check] = []
            while True:
                if cursor.pgresult is not None and cursor.pgresult.nfields:
                    checks.append(_check(len(checks) + 1, cursor.pgresult))
                if not cursor.nextset():
                    return checks
    finally:
        await connection.close()


def _check(number: int, result: "PGresult") -> Check:
    name = f"query {number} ({(result.fname(0) or b'').decode('utf-8', 'replace')})"
    if not result.ntuples:
        return Check(name, passed=False, said="no row")
    value = result.get_value(0, 0)
    text = "null" if value is None else value.decode("utf-8", "replace")
    return Check(name, not (value is None or _is_false(result.ftype(0), text)), text[:_SHOWN_CHARACTERS])


def _is_false(type_oid: int, text: str) -> bool:
    return text == "f" if type_oid == _BOOL else type_oid in _NUMBERS and text.strip("-0.") == ""


def _told(error: "psycopg.Error", sql: str) -> str:
    words = error.diag.message_primary or str(error)
    position = error.diag.statement_position
    at = f", at: {sql[int(position) - 1 :][:60]}" if position else ""
    return " ".join(f"{words}{at}".split())


def require_program(directory: Path, name: str) -> Path:
    """Return the path of one of PostgreSQL's programs.

    Raises:
        ConfigError: It is not there.
    """
    program = directory / name
    if not program.is_file():
        raise ConfigError(
            f"{name} is not in {directory}, where postgres is",
            hint=f"Use an image with PostgreSQL's programs (pg_amcheck comes with 14 and later), or leave {name[3:]} "
            "out of PITR_VALIDATE.",
        )
    return program


async def run_program(program: Path, arguments: Sequence[str], *, seconds: float) -> Check:
    """Run a program that exits 0 if all is well; what it says last is what the check says.

    Raises:
        PostgresError: It took longer than `seconds`.
    """
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise PostgresError(
            f"{program.name} did not end within {seconds:g} s", hint="Raise PITR_VALIDATE_TIMEOUT."
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    said = " ".join(output.decode("utf-8", "replace").split())
    return Check(program.name, process.returncode == 0, said[-_SHOWN_CHARACTERS:])
