"""A hydrated directory that becomes a standby of the cluster it comes from.

Its WAL comes from the repository first, and from the primary when the repository has no more. The password goes into a
file of its own, which only the server's user can read: settings show in pg_settings, and in copies of the directory.
"""

from pathlib import Path

from agent.domain.restore_target import TargetKind
from agent.environment import Secret
from agent.errors import ConfigError
from agent.postgres.conninfo import password_line, split_password
from agent.postgres.durable import replace_durably
from agent.restore.recovery_settings import STANDBY_SIGNAL, standby_settings, write_recovery_settings
from agent.settings import RestoreAs, Settings

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


def write_standby_settings(data_directory: Path, command: str, primary_conninfo: Secret[str] | None) -> None:
    """Make a hydrated directory, which has no pg_control yet, a standby when it is started; durable on return.

    Its archiving stays as the primary's is: once promoted it goes on with the same repository. Blocks for file I/O.

    Args:
        data_directory: The directory.
        command: restore_command.
        primary_conninfo: How to reach the primary; None: it follows what is archived alone.

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
    settings = standby_settings(command, conninfo.strip())
    write_recovery_settings(data_directory, settings, keep_archiving=True, signal=STANDBY_SIGNAL)
