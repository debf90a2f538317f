"""Every error the agent raises on purpose.

AgentError                      exit  for the operator
├── ConfigError                 10    fix the settings or the directory they name
├── PostgresError               11    PostgreSQL could not be reached, or refused
├── AgentUnavailable            12    no agent answers on the control socket
├── AgentAnswer                       what the running agent told, with the code that it told
├── RepositoryError
│   ├── RepositoryUnavailable   20    transient: retrying may help
│   ├── RepositoryRefused       21    permanent: credentials, policy, bucket
│   └── RepositoryCorrupt       22    an object's bytes are not what was stored
│       └── WrongKey            23    an object was encrypted with another key, or only one of the two has a key
├── WalConflict                 30    the archive holds other bytes under this name
├── WalRefused                  31    a WAL file is not what its name or this repository says
├── WalNotArchived              32    the agent had to end while finished WAL files were not archived
├── NoRestorePath               40    no base backup and WAL chain reaches the target
├── BackupFailed                50    a base backup was given up; nothing of it is listed
│   └── BackupElsewhere         50    another agent is taking one of the same server
├── RestoreFailed               51    a restore was given up; the directory cannot start by accident
│   └── RestoreInterrupted      51    it was told to end
└── ValidationFailed            52    the restored server does not pass PITR_VALIDATE_SQL or PITR_VALIDATE
"""

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar


class AgentError(Exception):
    """Base of the errors above. `hint` is one sentence on what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def one_line(self) -> str:
        """Return message and hint as one line for a terminal, a log or a hook's stderr."""
        text = f"{self.message}. {self.hint}" if self.hint else self.message
        return " ".join(text.split())

    def lines(self) -> list[str]:
        """Return what a person reads, a line for each thing that is wrong."""
        return [self.one_line()]


def one_line(error: BaseException) -> str:
    """Return the line of an `AgentError`; any other is a bug, and shown as it is."""
    return error.one_line() if isinstance(error, AgentError) else repr(error)


class ConfigError(AgentError):
    """A setting, or the directory or file it names, cannot be used."""

    exit_code = 10


class PreflightFailed(ConfigError):
    """A restore cannot be carried out on this machine; `problems` are all the reasons, each with its next step."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__("; ".join(problem.message for problem in problems), hint=problems[0].hint)
        self.problems = tuple(problems)

    def lines(self) -> list[str]:
        """Return one line for each problem."""
        return [problem.one_line() for problem in self.problems]


class PostgresError(AgentError):
    """PostgreSQL could not be reached, or answered with an error."""

    exit_code = 11


class AgentUnavailable(AgentError):
    """No running agent answers on the control socket."""

    exit_code = 12


class AgentAnswer(AgentError):
    """An error that the agent told, with its own exit code."""

    def __init__(self, message: str, *, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.told_exit_code = exit_code


class RepositoryError(AgentError):
    """Base of what can go wrong between the agent and the object store."""

    exit_code = 20


class RepositoryUnavailable(RepositoryError):
    """The store did not answer, or answered with a passing fault."""

    exit_code = 20


class RepositoryRefused(RepositoryError):
    """The store refused: credentials, policy, a missing bucket, an unusable request."""

    exit_code = 21


class RepositoryCorrupt(RepositoryError):
    """An object's bytes are not what was stored, or not in the format its name says."""

    exit_code = 22


class WrongKey(RepositoryCorrupt):
    """An object cannot be decrypted from its very beginning: it has another key than is configured, or none, or one
    where none is configured. Damage just there looks the same."""

    exit_code = 23


class WalConflict(AgentError):
    """The archive holds other bytes under this WAL file's name."""

    exit_code = 30


class WalRefused(AgentError):
    """A WAL file's size or header does not fit its name, or it belongs to another database cluster."""

    exit_code = 31


class WalNotArchived(AgentError):
    """The agent had to end before all WAL of a stopped server was archived, or a check waited in vain for a segment."""

    exit_code = 32


class NoRestorePath(AgentError):
    """No base backup with unbroken WAL reaches the recovery target.

    `nearest_before` and `nearest_after` are the nearest moments that can be reached, None where there is none.
    """

    exit_code = 40

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        nearest_before: datetime | None = None,
        nearest_after: datetime | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.nearest_before = nearest_before
        self.nearest_after = nearest_after


class BackupFailed(AgentError):
    """A base backup was given up; it has no sentinel, so it does not exist."""

    exit_code = 50


class BackupElsewhere(BackupFailed):
    """Another agent is taking a base backup of the same server."""


class RestoreFailed(AgentError):
    """A restore was given up before its target was reached."""

    exit_code = 51


class RestoreInterrupted(RestoreFailed):
    """A signal ended a restore; the same request goes on where it stopped."""


class ValidationFailed(AgentError):
    """A server was restored, and stays, but it does not pass the checks that were asked for."""

    exit_code = 52


def library_missing(error: ImportError) -> ConfigError:
    """Return what to tell where a module cannot be imported that is only imported when it is needed.

    One of our own, too: it is replaced under a running agent when a new release is installed.
    """
    which = f"the Python package {error.name}" if error.name else "a Python package"
    return ConfigError(
        f"{which} cannot be imported: {error}", hint="Install postgres-pitr again, with all that it depends on."
    )
