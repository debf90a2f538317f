"""Rules of `pitr check` about the store of the repository: what it can do, and what else is done to its objects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from agent.domain.checks import Finding, Seen, failed_with, passed, skipped, warned
from agent.errors import AgentError

MOST_SKEW = timedelta(minutes=5)
"""Difference of two clocks beyond which nothing expires. S3 refuses requests from 15 minutes on."""
NOT_TRIED = "not tried, because of what failed above"


class Operation(StrEnum):
    """What is tried on the store, in this order."""

    LIST = "LIST"
    PUT = "PUT"
    HEAD = "HEAD"
    GET = "GET"
    LIST_AFTER_PUT = "LIST after PUT"
    CONDITIONAL_PUT = "conditional PUT"
    LARGE_OBJECT = "large object"
    DELETE = "DELETE"
    ABSENT = "absent object"


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one operation: seconds it took if it went well, else the problem. Both None: it was not tried."""

    seconds: float | None = None
    problem: AgentError | None = None


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What came of every operation, which objects could not be removed again, and the clock here minus the store's."""

    trials: Mapping[Operation, Trial]
    left_behind: Sequence[str]
    skew: Seen[timedelta] | None


@dataclass(frozen=True, slots=True)
class LifecycleRule:
    """One enabled lifecycle rule of a bucket that concerns objects without tags.

    prefix: of the keys it is for. removes: it removes objects; archives: it moves them to where they cannot be read at
    once. when: after how long, in words. removes_versions: it removes what was replaced or deleted before.
    """

    name: str
    prefix: str
    removes: bool
    archives: bool
    removes_versions: bool
    when: str


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where the credentials are from, in words; when they end, None if never; whether others are then found."""

    source: str
    expires_at: datetime | None
    are_renewed: bool


@dataclass(frozen=True, slots=True)
class BucketFacts:
    """What only a bucket of S3 has. Each is what was seen, or why it could not be.

    prefix: of the repository in it, with its slash, or empty. reads_ranges: a part of an object can be read.
    compares_checksums: a body that does not fit its checksum is refused. versioning: Enabled, Suspended or Off.
    lock: the default retention in words, None without one.
    """

    prefix: str
    reads_ranges: Seen[bool]
    compares_checksums: Seen[bool]
    is_conditional: Seen[bool]
    versioning: Seen[str]
    lock: Seen[str | None]
    lifecycle: Seen[Sequence[LifecycleRule]]
    credentials: Seen[Credentials]


_MEANING = {
    Operation.LIST: "the repository can be listed",
    Operation.HEAD: "an object can be described",
    Operation.GET: "it is read as it was stored",
    Operation.LIST_AFTER_PUT: "it is listed as soon as it is stored",
    Operation.CONDITIONAL_PUT: "what exists is not replaced",
    Operation.LARGE_OBJECT: "objects are stored in parts, and read again",
    Operation.DELETE: "objects can be removed",
    Operation.ABSENT: "what is not there is told apart from what cannot be seen",
    Operation.PUT: "objects can be stored",
}
_MAY_BE_LACKING = {
    Operation.CONDITIONAL_PUT: "Let one agent alone write to this prefix: nothing else keeps two from replacing WAL.",
    Operation.DELETE: "Allow s3:DeleteObject if this agent is to expire base backups; else let another do it.",
}


def store_findings(facts: StoreFacts) -> Iterator[Finding]:
    """Say what the store can do for the agent."""
    for operation, trial in facts.trials.items():
        yield _trial(operation, trial)
    if facts.left_behind:
        names = ", ".join(facts.left_behind)
        yield warned("probe objects", f"could not be removed: {names}", "Remove them; nothing reads them.")
    if facts.skew is not None:
        yield _clock(facts.skew)


def _trial(operation: Operation, trial: Trial) -> Finding:
    if trial.seconds is not None:
        return passed(operation, f"{_MEANING[operation]} ({trial.seconds * 1000:.0f} ms)")
    if trial.problem is None:
        return skipped(operation, NOT_TRIED)
    if operation in _MAY_BE_LACKING:
        return warned(operation, trial.problem.message, _MAY_BE_LACKING[operation])
    return failed_with(operation, trial.problem)


def _clock(skew: Seen[timedelta]) -> Finding:
    if isinstance(skew, AgentError):
        return skipped("clock", skew.message)
    seconds = round(skew.total_seconds())
    text = f"{abs(seconds)} s {'ahead of' if seconds > 0 else 'behind'} the store's" if seconds else "as the store's"
    if abs(skew) > MOST_SKEW:
        return warned("clock", f"{text}: nothing expires, and from 15 minutes on S3 refuses", "Set this clock (NTP).")
    return passed("clock", text)


def bucket_findings(facts: Seen[BucketFacts], *, is_writable: bool, keeps: timedelta | None) -> Iterator[Finding]:
    """Say what a bucket can do, and what else is done to its objects.

    Args:
        facts: What was seen of it.
        is_writable: An object could be stored; without that its abilities were not seen.
        keeps: The window of the agent's own retention, None without one.
    """
    if isinstance(facts, AgentError):
        yield skipped("bucket", facts.message, facts.hint)
        return
    for ability, has in (
        (_RANGES, facts.reads_ranges), (_CHECKSUMS, facts.compares_checksums), (_CONDITIONS, facts.is_conditional)
    ):  # fmt: skip
        yield _ability(ability, has) if is_writable else skipped(ability.subject, NOT_TRIED)
    yield _versioning(facts)
    yield _lock(facts.lock)
    yield _lifecycle(facts, keeps)
    yield _credentials(facts.credentials)


@dataclass(frozen=True, slots=True)
class _Ability:
    subject: str
    present: str
    lacking: str


_RANGES = _Ability("ranged GET", "a part of an object can be read", "a download that breaks cannot go on")
_CHECKSUMS = _Ability("checksums", "a damaged body is refused", "the store does not notice a damaged body")
_CONDITIONS = _Ability(
    "If-None-Match",
    "the store keeps what exists, stored whole or in parts",
    "the store replaces what exists: the agent looks first, which is no protection against another writer",
)


def _ability(ability: _Ability, has: Seen[bool]) -> Finding:
    if isinstance(has, AgentError):
        return skipped(ability.subject, has.message)
    if has:
        return passed(ability.subject, ability.present)
    return warned(ability.subject, ability.lacking, "Use a newer release of the S3 server, if there is one.")


def _not_seen(subject: str, permission: str, error: AgentError) -> Finding:
    return skipped(subject, error.message, f"Allow s3:{permission} to have this looked at; the agent does not need it.")


def _concerns(rule: LifecycleRule, prefix: str) -> bool:
    return rule.prefix.startswith(prefix) or prefix.startswith(rule.prefix)


def _versioning(facts: BucketFacts) -> Finding:
    subject, state = "versioning", facts.versioning
    if isinstance(state, AgentError):
        return _not_seen(subject, "GetBucketVersioning", state)
    if state != "Enabled" or isinstance(facts.lifecycle, AgentError):
        return passed(subject, "off: what is deleted is gone" if state != "Enabled" else "on")
    if any(rule.removes_versions and _concerns(rule, facts.prefix) for rule in facts.lifecycle):
        return passed(subject, "on; a lifecycle rule removes old versions")
    fix = "Add a lifecycle rule with NoncurrentVersionExpiration."
    return warned(subject, "on: the bytes of what expires stay, and are paid for, for ever", fix)


def _lock(lock: Seen[str | None]) -> Finding:
    if isinstance(lock, AgentError):
        return _not_seen("object lock", "GetBucketObjectLockConfiguration", lock)
    return passed("object lock", f"{lock}: what expires earlier stays until then" if lock else "no default retention")


def _lifecycle(facts: BucketFacts, keeps: timedelta | None) -> Finding:
    subject, rules = "lifecycle", facts.lifecycle
    if isinstance(rules, AgentError):
        return _not_seen(subject, "GetLifecycleConfiguration", rules)
    ours = [rule for rule in rules if _concerns(rule, facts.prefix)]
    for rule in ours:
        if rule.removes:
            text = f"rule {rule.name!r} removes objects {rule.when}, needed or not: base backups and WAL break"
            window = f", and PITR_RETENTION ({keeps.days} days) is not asked" if keeps else ""
            return warned(subject, text + window, "Remove the rule, and set PITR_RETENTION: it keeps what is needed.")
        if rule.archives:
            text = f"rule {rule.name!r} moves objects {rule.when} to where they cannot be read at once"
            return warned(subject, text, "Remove the rule: a restore would have to wait for hours.")
    return passed(subject, "no rule removes or archives what is stored here")


def _credentials(credentials: Seen[Credentials]) -> Finding:
    subject = "credentials"
    if isinstance(credentials, AgentError):
        return failed_with(subject, credentials)
    if not credentials.are_renewed:
        fix = "Give the agent a web identity (IRSA), or a file that is renewed, in place of AWS_SESSION_TOKEN."
        return warned(subject, f"{credentials.source}: a session, which will end, and is not renewed", fix)
    if credentials.expires_at is not None:
        return passed(
            subject, f"{credentials.source}, until {credentials.expires_at:%Y-%m-%d %H:%M:%S} UTC, then renewed"
        )
    return passed(subject, f"{credentials.source}; they do not expire")
