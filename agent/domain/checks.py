"""What `pitr check` says: findings, each with what to do, and what the whole of them means.

The rules that make findings of what was seen are pure, and beside this: `server_checks`, `volume_checks`,
`store_checks`. What could not be looked at is told as such; it never passes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TypeAlias, TypeVar

from agent.errors import AgentError

T = TypeVar("T")
Seen: TypeAlias = T | AgentError
"""What a look at something found, or why nothing could be seen."""


class Verdict(StrEnum):
    """What is to be thought of one thing. SKIP: it was not looked at, and the text says why."""

    PASS = auto()
    WARN = auto()
    FAIL = auto()
    SKIP = auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    subject: what it is: a setting, a right, an operation. text: what was seen. fix: what to do, lines to be typed
    included; "" if nothing is to be done. exit_code: of a FAIL, as `agent.errors` has it, else 0.
    """

    subject: str
    verdict: Verdict
    text: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """Findings about one thing, under its name."""

    title: str
    findings: tuple[Finding, ...]


def passed(subject: str, text: str) -> Finding:
    """Return what is as it should be."""
    return Finding(subject, Verdict.PASS, text)


def warned(subject: str, text: str, fix: str) -> Finding:
    """Return what works, and will not always, or not for everybody."""
    return Finding(subject, Verdict.WARN, text, fix)


def failed(subject: str, text: str, fix: str, kind: type[AgentError]) -> Finding:
    """Return what keeps WAL or base backups from the repository, or a restore from working."""
    return Finding(subject, Verdict.FAIL, text, fix, kind.exit_code)


def failed_with(subject: str, error: AgentError) -> Finding:
    """Return that a look ended in `error`."""
    return Finding(subject, Verdict.FAIL, error.message, error.hint, error.exit_code)


def skipped(subject: str, reason: str, fix: str = "") -> Finding:
    """Return that `subject` was not looked at."""
    return Finding(subject, Verdict.SKIP, reason, fix)


def exit_code_of(sections: Iterable[Section]) -> int:
    """Return 0 if nothing failed, else the exit code of the first failure."""
    return next((each.exit_code for section in sections for each in section.findings if each.exit_code), 0)
