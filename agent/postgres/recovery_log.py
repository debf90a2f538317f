"""What PostgreSQL says while it recovers, and what its last words mean.

The server runs with `lc_messages=C` and an empty `log_line_prefix`, so a line begins with its severity. Lines without
one come from the hook. Message texts are the same in PostgreSQL 13 to 18 unless a comment says otherwise.
"""

import re
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime

from agent.domain.lsn import parse_lsn
from agent.domain.restore_target import format_time
from agent.domain.wal import parse_segment_name
from agent.errors import RestoreFailed

_SEVERITY = re.compile(r"(DEBUG\d?|LOG|INFO|NOTICE|WARNING|ERROR|FATAL|PANIC|DETAIL|HINT|CONTEXT|STATEMENT): +(.*)")
_RESTORED = re.compile(r'restored log file "([0-9A-F]{24})" from archive')
_REDO_DONE = re.compile(r"redo done at ([0-9A-F]+/[0-9A-F]+)")
_LAST_COMMIT = re.compile(r"last completed transaction was at log time (.+)")
_NEW_TIMELINE = re.compile(r"selected new timeline ID: (\d+)")
_PREPARED = re.compile(r"recovering prepared transaction (\d+) from shared memory")
_HOOK_SAID = re.compile(r"pitr-hook: restore \S+: (.*?)\.?(?: \(waited .*)?")
_LAST_LINES = 20


@dataclass(slots=True)
class RecoveryLog:
    """What the log has told so far.

    segment_bytes: wal_segment_size, to turn names into positions.
    restored_lsn: end of the furthest segment that restore_command has delivered.
    stopped: why replay stopped before the end of WAL, in PostgreSQL's words; None if it did not.
    redo_done_lsn: start of the last record that was replayed.
    last_commit_at: time of the last transaction that was replayed.
    new_timeline: the timeline that promotion has begun.
    prepared_transactions: how many came back in doubt: they hold locks until someone ends them.
    is_ready: the server takes connections: recovery is over.
    fatal, hint: the first line that says why it gave up, with its detail, and PostgreSQL's own advice.
    last_lines: the end of the log.
    """

    segment_bytes: int
    restored_lsn: int = 0
    stopped: str | None = None
    redo_done_lsn: int | None = None
    last_commit_at: datetime | None = None
    new_timeline: int | None = None
    prepared_transactions: int = 0
    is_ready: bool = False
    fatal: str | None = None
    hint: str | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    _in_first_fatal: bool = False

    def feed(self, line: str) -> None:
        """Take the next line of the log.

        Source: xlogrecovery.c (13, 14: xlog.c), xlogarchive.c, xlog.c, twophase.c and postmaster.c in PostgreSQL.
        """
        self.last_lines.append(line)
        match = _SEVERITY.match(line)
        if match is None:
            return
        severity, text = match.groups()
        if severity == "LOG":
            self._feed_log(text)
        elif severity in ("FATAL", "PANIC"):
            self._in_first_fatal = self.fatal is None
            self.fatal = self.fatal or text
        elif severity == "DETAIL" and self._in_first_fatal:
            self.fatal = f"{self.fatal} ({text})"
        elif severity == "HINT" and self._in_first_fatal:
            self.hint = text

    def _feed_log(self, text: str) -> None:
        self._in_first_fatal = False
        if match := _RESTORED.match(text):
            _, start_lsn = parse_segment_name(match[1], self.segment_bytes)
            self.restored_lsn = max(self.restored_lsn, start_lsn + self.segment_bytes)
        elif text.startswith("recovery stopping "):
            self.stopped = text
        elif match := _REDO_DONE.match(text):
            self.redo_done_lsn = parse_lsn(match[1])
        elif match := _LAST_COMMIT.match(text):
            self.last_commit_at = _read_time(match[1])
        elif match := _NEW_TIMELINE.match(text):
            self.new_timeline = int(match[1])
        elif _PREPARED.match(text):
            self.prepared_transactions += 1
        elif text == "database system is ready to accept connections":
            self.is_ready = True


def _read_time(text: str) -> datetime | None:
    """Read PostgreSQL's ISO form in UTC; None for a time that Python cannot hold (infinity, BC)."""
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None


_AGAIN = "Run the restore again: replay goes on where it stopped."
_EARLIER_TARGET = "Restore into an empty directory with an earlier target, or without one to replay to the end."
_NEVER_THE_LABEL = "Never remove backup_label, whatever PostgreSQL's own hint says: that gives a damaged database."
_DIAGNOSES: tuple[tuple[str, str], ...] = (
    ("No space left on device", f"Enlarge the volume. {_AGAIN}"),
    ("recovery ended before configured recovery target was reached", _EARLIER_TARGET),
    (
        "requested recovery stop point is before consistent recovery point",
        "The target lies within the base backup: restore into an empty directory with an older BACKUP_NAME, "
        "or a later target.",
    ),
    (
        "requested timeline .* (is not a child of|does not contain)",
        "Set TARGET_TIMELINE to a timeline that this base backup leads to, or BACKUP_NAME to one that leads there, "
        "and restore into an empty directory.",
    ),
    (
        "could not locate (required|a valid) checkpoint record|could not find redo location|invalid checkpoint record",
        f"The WAL of the base backup did not arrive: run `pitr verify`. {_NEVER_THE_LABEL}",
    ),
    (
        "WAL ends before (end of online backup|consistent recovery point)",
        f"WAL that the base backup needs is missing or damaged: run `pitr verify`. {_NEVER_THE_LABEL}",
    ),
    (
        "could not restore file .* from archive",
        f"The agent could not deliver it; its own log says why. Once that is mended: {_AGAIN[0].lower()}{_AGAIN[1:]}",
    ),
    (
        "archive file .* has wrong size",
        "The archived segment is damaged: run `pitr verify --deep`, and restore to a moment before it.",
    ),
    (
        "wal_level.*minimal",
        "WAL written under wal_level=minimal cannot be replayed: restore to a moment before it, or from a later "
        "base backup.",
    ),
    # Where prepared transactions are looked for, see `_Planner` in `agent.domain.restore_plan`.
    (
        "requested WAL segment .* has already been removed",
        "A prepared transaction is in doubt in it, and only a later timeline's copy is archived: copy that one, which "
        f"is in pg_wal and ends in the same 16 digits, to this name. {_AGAIN}",
    ),
    # Raised on the primary after the base backup: the control file knows it now, and the next run starts with it.
    ("maximum number of prepared transactions reached", _AGAIN),
    (
        "insufficient parameter settings|insufficient because|is a lower setting than on the (primary|master)",
        "Remove hot_standby=on from the server's command line: recovery needs it off.",
    ),
    (
        "could not access file|could not load library",
        "The image lacks a library that shared_preload_libraries names: use the image that the server ran with.",
    ),
    (
        "database files are incompatible with server",
        "Use the PostgreSQL build that wrote the base backup: the same major version and block sizes.",
    ),
    (
        "could not map anonymous shared memory|could not create shared memory segment|Cannot allocate memory",
        "Give this container the memory that the server's own settings (shared_buffers) ask for.",
    ),
    (
        'lock file "postmaster.pid" already exists',
        "Another server runs in this directory, or one that was killed is still stopping: make sure that none does, "
        "then run the restore again.",
    ),
    (
        "has (wrong ownership|invalid permissions)",
        "The data directory must belong to the user that this runs as, with mode 0700 or 0750.",
    ),
    ("Unix-domain socket path .* is too long", "Set TMPDIR to a directory with a shorter path."),
    (
        "configuration file .* contains errors|invalid value for parameter|unrecognized configuration parameter",
        f"Correct the configuration in the data directory. {_AGAIN}",
    ),
)


def recovery_failure(log: RecoveryLog, exit_code: int) -> RestoreFailed:
    """Say why a server that ended with `exit_code` did not come through recovery, and what to do next."""
    if log.fatal is not None:
        unknown = f"{log.hint or 'Mend that.'} {_AGAIN}"
        said = f"{log.fatal}{_details(log, log.fatal)}"
        hint = next((hint for pattern, hint in _DIAGNOSES if re.search(pattern, said)), unknown)
        return RestoreFailed(f"PostgreSQL gave up recovery: {said}", hint=hint)
    if not any(_SEVERITY.match(line) for line in log.last_lines):
        said = "; ".join(log.last_lines) or "nothing"
        return RestoreFailed(
            f"PostgreSQL could not be started (exit code {exit_code}), it said: {said}",
            hint="Check that PITR_POSTGRES_BIN names a complete installation, and that this user may run it.",
        )
    return RestoreFailed(f"PostgreSQL was stopped before recovery was done (exit code {exit_code})", hint=_AGAIN)


def _details(log: RecoveryLog, fatal: str) -> str:
    """What helps to understand `fatal` beyond its words."""
    if "before configured recovery target" in fatal and log.last_commit_at is not None:
        return f"; the last transaction in the archived WAL is of {format_time(log.last_commit_at)}"
    if fatal.startswith("could not restore file "):
        reasons = [match[1] for line in log.last_lines if (match := _HOOK_SAID.fullmatch(line))]
        return "".join(f"; {reason}" for reason in reasons[-1:])
    if "contains errors" in fatal:
        errors = [line.removeprefix("LOG:").strip() for line in log.last_lines if line.startswith("LOG:")]
        return "".join(f"; {error}" for error in errors)
    return ""
