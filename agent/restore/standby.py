"""A hydrated directory that becomes a standby of the cluster it comes from.

Its WAL comes from the repository first, and from the primary when the repository has no more. The password goes into a
file of its own, which only the server's user can read: settings show in pg_settings, and in copies of the directory.
"""

from collections.abc import Mapping
from pathlib import Path

import structlog

from agent.domain.control_file import ControlFile
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import TargetKind
from agent.domain.wal_search import highest_limits
from agent.environment import Secret
from agent.errors import ConfigError, RepositoryCorrupt
from agent.postgres.conninfo import password_line, split_password
from agent.postgres.durable import replace_durably
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import WalIndex
from agent.restore.recovery_settings import STANDBY_SIGNAL, standby_settings, write_recovery_settings
from agent.settings import RestoreAs, Settings
from agent.telemetry.progress import Progress, ReportProgress

log = structlog.get_logger()

PREPARING = "preparing"
"""The stage of a restore in which a hydrated directory becomes a standby."""
PASSWORD_FILE = "pitr.primary.pgpass"  # noqa: S105 - a name; base backups leave out what begins with "pitr."


def standby_problems(settings: Settings) -> list[ConfigError]:
    """Return which settings do not go with `PITR_RESTORE_AS=standby`; none if it is not set."""
    if settings.restore_as is not RestoreAs.STANDBY:
        return []
    problems = []
    if settings.target.kind is not TargetKind.END_OF_WAL or settings.target.timeline != "latest":
        problems.append(
            ConfigError(
                f"a standby follows its primary, but the target is {settings.target}", hint="Unset TARGET_... ."
            )
        )
    if settings.auto_start:
        problems.append(ConfigError("a standby is not promoted, but AUTO_START is set", hint="Unset AUTO_START."))
    if settings.primary_conninfo is not None:
        try:
            split_password(settings.primary_conninfo.reveal())
        except ConfigError as error:
            problems.append(error)
    return problems


async def raised_limits(
    archive: WalArchive, plan: RestorePlan, control: ControlFile, report: ReportProgress
) -> dict[str, int]:
    """Return the limits that the primary raised after the base backup, with the highest value of each.

    A standby that has less pauses for ever when it comes there (14 and later), or ends (13). All the WAL of the plan is
    read for it, up to damage: the standby will, too.
    Source: CheckRequiredParameterValues() in PostgreSQL's xlogrecovery.c.

    Args:
        archive: The WAL.
        plan: From the base backup to the end of the WAL.
        control: The base backup's control file.
        report: Is told the progress, in bytes of WAL.

    Raises:
        RepositoryError: The WAL could not be read.
    """

    def read(segments: int) -> None:
        report(Progress(PREPARING, segments * plan.segment_bytes, len(plan.segments) * plan.segment_bytes))

    index = WalIndex(archive, plan.backup.system_identifier, plan.segment_bytes)
    highest: dict[str, int] = {}
    try:
        await index.follow(highest_limits(plan.segments, highest, read))
    except RepositoryCorrupt as error:
        # No reason to have no standby: it may get that WAL from its primary, and says itself what it lacks.
        log.warning("limits that the primary raised are not all known", reason=error.one_line())
    return {name: value for name, value in highest.items() if value > getattr(control, name)}


def write_standby_settings(
    data_directory: Path, command: str, primary_conninfo: Secret[str] | None, limits: Mapping[str, int]
) -> None:
    """Make a hydrated directory, which has no pg_control yet, a standby when it is started; durable on return.

    Its archiving stays as the primary's is: once promoted it goes on with the same repository. Blocks for file I/O.

    Args:
        data_directory: The directory.
        command: restore_command.
        primary_conninfo: How to reach the primary; None: it follows what is archived alone.
        limits: See `raised_limits`.

    Raises:
        ConfigError: A value cannot be written into PostgreSQL's configuration.
        OSError: The volume failed.
    """
    conninfo, password = "", None
    if primary_conninfo is not None:
        conninfo, password = split_password(primary_conninfo.reveal())
    if password is not None:
        replace_durably(data_directory / PASSWORD_FILE, password_line(password).encode())
        conninfo += f" passfile={PASSWORD_FILE}"  # of the server's working directory, which is the data directory
    settings = standby_settings(command, conninfo.strip()) | {name: str(value) for name, value in limits.items()}
    write_recovery_settings(data_directory, settings, keep_archiving=True, signal=STANDBY_SIGNAL)
