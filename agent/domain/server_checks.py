"""Rules of `pitr check` about the PostgreSQL server: its settings, and the rights of the agent's role.

Source: PostgreSQL docs, "Continuous Archiving and Point-in-Time Recovery (PITR)" and "Write Ahead Log" (settings).
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from agent.domain.checks import Finding, failed, passed, skipped, warned
from agent.domain.wal_records import LIMITS
from agent.errors import ConfigError, PostgresError

SETTINGS = (
    "wal_level", "archive_mode", "archive_command", "archive_library", "archive_timeout", "full_page_writes",
    "wal_segment_size", "data_checksums", "summarize_wal", "archive_cleanup_command", *LIMITS,
)  # fmt: skip
"""The settings that the rules look at, by their names in pg_settings; of `LIMITS`, only where they come from."""
RECOVERY_SETTINGS_FILE = "pitr.recovery.conf"
"""Name of the file, in the data directory, in which a restore leaves what leads PostgreSQL."""

# Last day of support of each major version. Source: postgresql.org, "Versioning Policy".
_SUPPORTED_UNTIL = {
    13: date(2025, 11, 13), 14: date(2026, 11, 12), 15: date(2027, 11, 11), 16: date(2028, 11, 9),
    17: date(2029, 11, 8), 18: date(2030, 11, 14),
}  # fmt: skip
# Source: release notes of 14.1 and 13.5, and of 14.4.
_BROKEN_RECORDS = "after a crash it may archive WAL that no recovery can follow"
_BROKEN_INDEXES = "CREATE INDEX CONCURRENTLY may leave out rows"
_BROKEN_BELOW = {13: (5, _BROKEN_RECORDS), 14: (4, _BROKEN_INDEXES)}
_HOOK = "wal-archive.sh"
_THROWS_AWAY = frozenset({"true", "/bin/true", "/usr/bin/true", ":", "exit 0", "cd ."})


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says of itself to the agent's role.

    settings: `SETTINGS` as pg_settings has them; what is missing there does not exist in this version, or is not
        shown to the role. pending_restart: those of them whose new value waits for a restart. set_by_restore: those
        that are in `RECOVERY_SETTINGS_FILE`.
    sorts_otherwise: databases whose text was sorted by another version of the C library or of ICU (15 and later tell).
    may_execute: whether the role may call each of `functions_needed`. reads_settings: it may see every setting.
    """

    version_num: int
    system_identifier: int
    in_recovery: bool
    database: str
    role: str
    is_superuser: bool
    reads_settings: bool
    may_execute: Mapping[str, bool]
    settings: Mapping[str, str]
    pending_restart: frozenset[str]
    set_by_restore: frozenset[str] = frozenset()
    sorts_otherwise: tuple[str, ...] = ()

    @property
    def major(self) -> int:
        """PostgreSQL's major version."""
        return self.version_num // 10_000


def functions_needed(major: int) -> tuple[str, ...]:
    """Return the functions, with their arguments, that only a superuser may call unless they are granted."""
    if major < 15:
        return "pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)", "pg_switch_wal()"
    return "pg_backup_start(text, boolean)", "pg_backup_stop(boolean)", "pg_switch_wal()"


def setting_findings(facts: ServerFacts, *, hook: str, uses_deltas: bool, today: date) -> Iterator[Finding]:
    """Say what there is to say of the version and the settings of a server.

    Args:
        facts: What it says of itself.
        hook: Path of `wal-archive.sh` as PostgreSQL sees it, for the fix.
        uses_deltas: Delta backups are switched on.
        today: For the end of support.
    """
    yield _version(facts, today)
    rules: dict[str, Callable[[str], Finding]] = {
        "wal_level": _wal_level,
        "archive_mode": _archive_mode,
        "archive_command": lambda value: archive_command(value, hook),
        "archive_timeout": _archive_timeout,
        "full_page_writes": _full_page_writes,
        "wal_segment_size": lambda value: passed("wal_segment_size", f"{int(value) >> 20} MiB"),
        "data_checksums": _data_checksums,
    }
    if facts.major >= 15:
        rules["archive_library"] = _archive_library
    if facts.major >= 17 and uses_deltas:
        rules["summarize_wal"] = _summarize_wal
    for name, rule in rules.items():
        value = facts.settings.get(name)
        if value is None:
            yield skipped(name, f"the server does not show it to role {facts.role}")
        elif name in facts.pending_restart:
            yield failed(name, f"{value}; it was changed, and waits for a restart", "Restart PostgreSQL.", ConfigError)
        else:
            yield rule(value)
    if cleanup := facts.settings.get("archive_cleanup_command"):
        yield _archive_cleanup_command(cleanup)
    if limits := [name for name in LIMITS if name in facts.set_by_restore]:
        yield _limits({name: facts.settings[name] for name in limits})
    if facts.sorts_otherwise:
        yield _collations(facts.sorts_otherwise)


def _alter(name: str, value: str, *, restart: bool = False) -> str:
    quoted = value.replace("'", "''")
    then = "then restart PostgreSQL." if restart else "SELECT pg_reload_conf();"
    return f"ALTER SYSTEM SET {name} = '{quoted}'; {then}"


def _version(facts: ServerFacts, today: date) -> Finding:
    major, minor = divmod(facts.version_num, 10_000)
    until = _SUPPORTED_UNTIL.get(major)
    if until is None:
        known = f"{min(_SUPPORTED_UNTIL)} to {max(_SUPPORTED_UNTIL)}"
        return failed("version", f"{major}.{minor}", f"Run PostgreSQL {known}.", PostgresError)
    broken_below, problem = _BROKEN_BELOW.get(major, (0, ""))
    if minor < broken_below:
        return warned("version", f"{major}.{minor}: {problem}", f"Install the newest {major}.x.")
    if today > until:
        return warned("version", f"{major}.{minor}: unsupported since {until}", "Upgrade to a newer major version.")
    return passed("version", f"{major}.{minor}")


def _wal_level(value: str) -> Finding:
    if value == "minimal":
        fix = _alter("wal_level", "replica", restart=True)
        return failed("wal_level", "minimal: WAL lacks what a recovery needs", fix, ConfigError)
    return passed("wal_level", value)


def _archive_mode(value: str) -> Finding:
    if value == "off":
        fix = _alter("archive_mode", "on", restart=True)
        return failed("archive_mode", "off: no WAL is archived", fix, ConfigError)
    return passed("archive_mode", value)


def archive_command(value: str, hook: str) -> Finding:
    """Say whether archive_command calls the hook with its arguments, and does nothing else."""
    subject, fix = "archive_command", _alter("archive_command", f"{shlex.quote(hook)} %p %f")
    if value == "(disabled)":
        return skipped(subject, "the server does not show it while archive_mode is off", fix)
    if not value:
        return failed(subject, "empty: WAL is kept in pg_wal until the volume is full", fix, ConfigError)
    if value.strip() in _THROWS_AWAY:
        return failed(subject, f"{value!r} tells PostgreSQL that WAL is archived, and it is not", fix, ConfigError)
    if _HOOK not in value:
        return failed(subject, f"{value!r} does not call {_HOOK}", fix, ConfigError)
    if _arguments(value) == ["%p", "%f"]:
        return passed(subject, value)
    if "%p %f" in value:
        return warned(subject, f"{value!r} does more than to call {_HOOK}: it has to fail if that fails", fix)
    return failed(subject, f"{value!r} does not give {_HOOK} the arguments %p %f", fix, ConfigError)


def hook_of(archive_command: str) -> str | None:
    """Return the path of the program that archive_command calls, or None if it is not the hook."""
    return shlex.split(archive_command)[0] if _arguments(archive_command) is not None else None


def _arguments(command: str) -> list[str] | None:
    """Return the arguments that a command gives to the hook after its options, or None if it calls another program."""
    try:
        program, *arguments = shlex.split(command)
    except ValueError:  # a quotation that does not end, or nothing
        return None
    while arguments[:1] and arguments[0] in ("--socket", "--timeout"):
        del arguments[:2]
    return arguments if program.rpartition("/")[2] == _HOOK else None


def _archive_library(value: str) -> Finding:
    if value:
        fix = _alter("archive_library", "")
        return failed("archive_library", f"{value!r} is called in place of archive_command", fix, ConfigError)
    return passed("archive_library", "none, so that archive_command is called")


def _archive_timeout(value: str) -> Finding:
    if value == "0":
        text = "0: what is committed waits until its WAL segment is full, however long that takes"
        return warned("archive_timeout", text, _alter("archive_timeout", "60"))
    return passed("archive_timeout", f"{value} s: the most that is lost with the volume, and the upload")


def _full_page_writes(value: str) -> Finding:
    if value == "off":
        text = "off: a crash may leave torn pages, and standbys take no base backups"
        return warned("full_page_writes", text, _alter("full_page_writes", "on"))
    return passed("full_page_writes", value)


def _data_checksums(value: str) -> Finding:
    if value == "on":
        return passed("data_checksums", value)
    fix = "Stop PostgreSQL in order, then pg_checksums --enable --pgdata=PGDATA."
    return warned("data_checksums", f"{value}: base backups cannot tell damaged pages", fix)


def _summarize_wal(value: str) -> Finding:
    if value == "on":
        return passed("summarize_wal", value)
    return warned("summarize_wal", "off: each delta reads the whole database", _alter("summarize_wal", "on"))


def _archive_cleanup_command(value: str) -> Finding:
    text = f"{value!r} removes WAL that this server has replayed, which base backups and other servers may need"
    return warned("archive_cleanup_command", text, _alter("archive_cleanup_command", ""))


def _limits(values: Mapping[str, str]) -> Finding:
    """A restore as a standby sets what its primary had; ALTER SYSTEM takes what is included apart, and so it out."""
    told = ", ".join(f"{name} = {value}" for name, value in values.items())
    resets = " ".join(f"ALTER SYSTEM RESET {name};" for name in values)
    return warned(
        "limits",
        f"{told}: by {RECOVERY_SETTINGS_FILE}, whatever postgresql.conf says",
        f"Set as much, or more, in postgresql.conf; {resets} then restart PostgreSQL.",
    )


def _collations(databases: Sequence[str]) -> Finding:
    """Source: PostgreSQL docs, "ALTER COLLATION", about versions."""
    names = ['"' + name.replace('"', '""') + '"' for name in databases]
    each = " ".join(f"REINDEX DATABASE {name}; ALTER DATABASE {name} REFRESH COLLATION VERSION;" for name in names)
    return warned(
        "collations",
        f"text in {', '.join(databases)} was sorted by another version of the C library or ICU: indexes may miss rows",
        f"Connected to each: {each}",
    )


def role_finding(facts: ServerFacts) -> Finding:
    """Say whether the role may do what the agent does, with the SQL that grants exactly what is missing."""
    if facts.is_superuser:
        return passed("role", f"{facts.role}, a superuser: more than the agent needs, see SECURITY.md")
    missing = [] if facts.reads_settings else ["pg_read_all_settings"]
    missing += [name for name in functions_needed(facts.major) if not facts.may_execute.get(name)]
    if not missing:
        return passed("role", f"{facts.role} may read the settings, take base backups and switch WAL")
    fix = "\n".join([f"As a superuser, in database {facts.database}:", *(_grant(each, facts.role) for each in missing)])
    return failed("role", f"{facts.role} lacks {', '.join(missing)}", fix, PostgresError)


def _grant(what: str, role: str) -> str:
    quoted = '"' + role.replace('"', '""') + '"'
    return f"GRANT {f'EXECUTE ON FUNCTION {what}' if '(' in what else what} TO {quoted};"
