"""What a restored server has to pass before it counts as restored: the user's queries and PostgreSQL's own programs."""

from collections.abc import Sequence
from pathlib import Path

import structlog

from agent.errors import ConfigError, ValidationFailed
from agent.postgres.postmaster import Postmaster
from agent.postgres.server_checks import Check, require_program, run_program, run_queries
from agent.settings import Settings
from agent.tasks import in_thread

log = structlog.get_logger()


def validation_queries(setting: str | None) -> str | None:
    """Return the text of PITR_VALIDATE_SQL: `setting`, or what is in the file that it names after an `@`.

    Raises:
        ConfigError: The file cannot be read.
    """
    if setting is None or not setting.startswith("@"):
        return setting
    try:
        return Path(setting[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"PITR_VALIDATE_SQL={setting} cannot be read: {reason}", hint="Mount the file there."
        ) from error


async def require_checks_possible(settings: Settings, programs: Path) -> None:
    """Return if the checks that are asked for can be run with the `programs` of PostgreSQL in that directory.

    Raises:
        ConfigError: A program, or the file of the queries, is missing.
    """
    await in_thread(validation_queries, settings.validation.sql)
    for asked, program in (
        (settings.validation.amcheck, "pg_amcheck"),
        (settings.validation.checksums, "pg_checksums"),
    ):
        if asked:
            await in_thread(require_program, programs, program)


async def validate(settings: Settings, program: Path, data_directory: Path) -> list[Check]:
    """Run what is asked for on the promoted, stopped server in `data_directory`; it is stopped again on return.

    pg_amcheck checks the databases that have the extension amcheck; in a drill it makes the extension where it lacks.

    Args:
        settings: What is asked for, and as whom.
        program: `postgres`, of the directory's major version.
        data_directory: Nobody else uses it.

    Raises:
        ConfigError: A program, or the file of the queries, is missing.
        RestoreFailed: The server does not start.
        PostgresError: It does not answer.
    """
    wanted, role, programs = settings.validation, settings.postgres, program.parent
    sql = await in_thread(validation_queries, wanted.sql)

    async def ask(host: Path, port: int) -> list[Check]:
        checks: list[Check] = []
        if sql is not None:
            checks += await run_queries(
                sql, host=host, port=port, user=role.user, database=role.database, seconds=wanted.timeout
            )
        if wanted.amcheck:
            where = ["--all", f"--host={host}", f"--port={port}", f"--username={role.user}", "--no-password"]
            install = ["--install-missing"] if settings.is_drill else []
            amcheck = require_program(programs, "pg_amcheck")
            checks.append(await run_program(amcheck, [*where, *install], seconds=wanted.timeout))
        return checks

    checks: list[Check] = []
    if sql is not None or wanted.amcheck:
        checks += await Postmaster(program, data_directory, {}).serve(ask)
    if wanted.checksums:
        checksums = require_program(programs, "pg_checksums")
        checks.append(await run_program(checksums, ["--check", f"--pgdata={data_directory}"], seconds=wanted.timeout))
    for check in checks:
        log.info("restored server checked", check=check.name, passed=check.passed, said=check.said)
    return checks


def require_passed(checks: Sequence[Check], data_directory: Path) -> None:
    """Return if all checks passed, else raise `ValidationFailed` naming those that did not."""
    if failed := [check for check in checks if not check.passed]:
        told = "; ".join(f"{check.name}: {check.said}" for check in failed)
        raise ValidationFailed(
            f"the server restored in {data_directory} does not pass {len(failed)} of {len(checks)} checks: {told}",
            hint="The data stays there, promoted and stopped: look at it, or restore another moment elsewhere.",
        )
