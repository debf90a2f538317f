"""The settings that lead PostgreSQL through one recovery, and through no other.

They are in a file of our own, `pitr.recovery.conf`, which `postgresql.auto.conf` includes as its last line:

- PostgreSQL reads `postgresql.auto.conf` from the data directory wherever its configuration lives otherwise (a mounted
  ConfigMap, /etc), and after it. So ours hold against anything but the command line.
- Recovery settings that outlive their recovery are part of later backups and act again in a later recovery, silently
  ending it too early. So PostgreSQL itself removes the file when recovery ends (`recovery_end_command`), and what an
  earlier recovery left in `postgresql.auto.conf` goes before ours are written.

`archive_mode = off` stays until a person takes it back (`ALTER SYSTEM RESET archive_mode`, restart): a restored server
must not archive into the repository that it came from, unless it was said to be the successor.

The order: settings, then `recovery.signal`, then (not here) `global/pg_control`. A directory that can start recovers.
Functions that take a directory block for file I/O: call them in a thread. They raise `OSError`.
"""

import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from agent.domain.lsn import format_lsn
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.server_checks import RECOVERY_SETTINGS_FILE
from agent.errors import ConfigError
from agent.postgres.durable import fsync_directory, remove_durably, replace_durably

AUTO_CONF = "postgresql.auto.conf"
RECOVERY_SIGNAL = "recovery.signal"
STANDBY_SIGNAL = "standby.signal"

_INCLUDE = f"include_if_exists = '{RECOVERY_SETTINGS_FILE}'"
_COMMENT = "# pitr restore:"
_HEADERS = {
    RECOVERY_SIGNAL: f"{_COMMENT} these lead one recovery and are removed at its end.\n",
    STANDBY_SIGNAL: f"{_COMMENT} these make a standby. `pitr check` says how to take its limits back.\n",
}
_RESERVED = b"hba_file = 'this restore was cut short, run pitr restore again'\n"
_ARCHIVE_OFF = f"""\
{_COMMENT} a restored server does not archive into the repository it came from.
{_COMMENT} once it has a repository of its own: ALTER SYSTEM RESET archive_mode, and restart.
archive_mode = 'off'
"""

# A line sets one parameter, and no value spans lines. Source: GUC_scanner in PostgreSQL's guc-file.l.
_NAME = re.compile(r"[ \t\r]*([A-Za-z_\x80-\xff][A-Za-z0-9_$.\x80-\xff]*)")
_UNQUOTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# What a standby, or an earlier recovery, leaves in postgresql.auto.conf. `promote_trigger_file` is fatal from 16 on.
_OF_A_RECOVERY = frozenset({
    "restore_command", "recovery_end_command", "recovery_min_apply_delay", "primary_conninfo", "primary_slot_name",
    "promote_trigger_file",
})  # fmt: skip


def postgres_time(moment: datetime) -> str:
    """Write an aware time as PostgreSQL reads it in a configuration file: `2026-11-22 19:53:41.000000+00`.

    The form with `Z` is refused there: the table of zone abbreviations is not loaded yet.
    """
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds") + "+00"


def restore_command(hook_directory: Path) -> str:
    """Return the restore_command that runs the hook in `hook_directory`, whatever characters its path has.

    Source: BuildRestoreCommand() in PostgreSQL's xlogarchive.c: a percent sign is written twice; the rest is a
    command line for the shell.
    """
    hook = shlex.quote(str(hook_directory / "wal-restore.sh")).replace("%", "%%")
    return f"{hook} %f %p"


def recovery_settings(target: RestoreTarget, command: str, *, read_ahead: bool = True) -> dict[str, str]:
    """Return the settings, with values not yet quoted, of a recovery to `target`, then promotion.

    Every recovery target is named, the unused ones empty, so that none holds from elsewhere. The timeline is
    decided by the plan: `latest` would follow whoever archived last. `hot_standby` is off, because a read-only server
    pauses for ever, or stops, where the primary raised one of five limits. A delay, a clean-up command or an upstream
    server that the primary's own configuration names are cancelled.

    Args:
        target: Where to stop, the plan's effective target; the end of WAL sets none.
        command: restore_command.
        read_ahead: Leave it to PostgreSQL how far it decodes WAL ahead of replay. False (15 and later know it): no
            further than it replays, so that it does not ask for a segment behind the target that is missing.
            Source: XLogPrefetcherNextBlock() in PostgreSQL's xlogprefetcher.c.
    """
    targets = {
        "recovery_target": "immediate" if target.kind is TargetKind.IMMEDIATE else "",
        "recovery_target_lsn": "" if target.lsn is None else format_lsn(target.lsn),
        "recovery_target_name": target.name or "",
        "recovery_target_time": "" if target.time is None else postgres_time(target.time),
        "recovery_target_xid": "" if target.xid is None else str(target.xid),
    }
    return {
        "restore_command": command,
        # The one that is set comes last: an empty one after it counts as a second target, which is fatal.
        # Source: assign_recovery_target_time() and its siblings in PostgreSQL's xlogrecovery.c.
        **dict(sorted(targets.items(), key=lambda item: item[1] != "")),
        "recovery_target_inclusive": "on" if target.inclusive else "off",
        "recovery_target_timeline": target.timeline,
        "recovery_target_action": "promote",
        "recovery_min_apply_delay": "0",
        "recovery_end_command": f"rm -f {RECOVERY_SETTINGS_FILE}",
        "archive_cleanup_command": "",
        "primary_conninfo": "",
        "primary_slot_name": "",
        "hot_standby": "off",
        **({} if read_ahead else {"recovery_prefetch": "off"}),
    }


def standby_settings(command: str, primary_conninfo: str) -> dict[str, str]:
    """Return the settings, with values not yet quoted, of a standby: it follows the newest timeline, and never ends.

    Args:
        command: restore_command; it is kept, for what the primary has no more.
        primary_conninfo: How to reach the primary; empty: the standby follows what is archived alone.
    """
    return {
        **recovery_settings(RestoreTarget(timeline="latest"), command),
        "recovery_target_action": "pause",
        "recovery_end_command": "",
        "primary_conninfo": primary_conninfo,
        "hot_standby": "on",
    }


def quote_value(name: str, value: str) -> str:
    """Quote `value` for a PostgreSQL configuration file.

    Raises:
        ConfigError: It holds a control character: none can be written, and a newline would begin another setting.

    Source: GUC_scanstr() in PostgreSQL's guc-file.l: a quote is doubled, a backslash escapes.
    """
    if _UNQUOTABLE.search(value):
        raise ConfigError(
            f"the value {value!r} of {name} cannot be written into PostgreSQL's configuration",
            hint="Use a value without control characters.",
        )
    escaped = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def render_settings(settings: Mapping[str, str]) -> str:
    """Write `settings` in the syntax of postgresql.conf, one a line. Raises `ConfigError` as `quote_value`."""
    return "".join(f"{name} = {quote_value(name, value)}\n" for name, value in settings.items())


def without_recovery_settings(auto_conf: str, *, keep_archiving: bool) -> str:
    """Return the text of a postgresql.auto.conf without what belongs to a standby, another recovery, or archiving.

    Args:
        auto_conf: The file's text; every other line is kept as it is.
        keep_archiving: Keep archive_mode, archive_command and their like.
    """
    return "\n".join(line for line in auto_conf.split("\n") if not _is_dropped(line, keep_archiving=keep_archiving))


def _is_dropped(line: str, *, keep_archiving: bool) -> bool:
    match = _NAME.match(line)
    if match is None:
        return line.startswith(_COMMENT)
    name = match[1].lower()
    if name in _OF_A_RECOVERY or name.startswith("recovery_target") or name == "archive_cleanup_command":
        return True
    return _is_include(line) or (name.startswith("archive_") and not keep_archiving)


def _is_include(line: str) -> bool:
    return line.strip() == _INCLUDE


def write_recovery_settings(
    data_directory: Path, settings: Mapping[str, str], *, keep_archiving: bool, signal: str = RECOVERY_SIGNAL
) -> None:
    """Make a hydrated directory, which has no pg_control yet, recover by `settings` when it is started.

    Exactly one signal file is left, `signal`: with `standby.signal` recovery never ends. Durable on return; may be
    repeated after a crash.

    Raises:
        ConfigError: A value cannot be quoted; nothing has been written.
    """
    rendered = _HEADERS[signal] + render_settings(settings)
    auto_conf = without_recovery_settings(_read_auto_conf(data_directory), keep_archiving=keep_archiving)
    if auto_conf and not auto_conf.endswith("\n"):
        auto_conf += "\n"
    auto_conf += ("" if keep_archiving else _ARCHIVE_OFF) + _INCLUDE + "\n"
    replace_durably(data_directory / RECOVERY_SETTINGS_FILE, rendered.encode())
    _write_auto_conf(data_directory, auto_conf)
    for name in (STANDBY_SIGNAL, RECOVERY_SIGNAL):
        (data_directory / name).unlink(missing_ok=True)
    (data_directory / signal).touch(mode=0o600)
    fsync_directory(data_directory)


def reserve_recovery(data_directory: Path) -> None:
    """See to it that no server but ours, which names its own hba_file, can be started until recovery has ended.

    Another one, started after ours was killed at the wrong moment of a promotion, would replay beyond the target. It
    ends at once with this line's words instead; the settings go when recovery is over. Durable on return.
    """
    path = data_directory / RECOVERY_SETTINGS_FILE
    if path.exists() and _RESERVED not in (content := path.read_bytes()):
        replace_durably(path, content + _RESERVED)


def remove_recovery_settings(data_directory: Path) -> None:
    """Take our settings out of a promoted, stopped directory, except `archive_mode = off`; durable on return.

    PostgreSQL has removed the file itself if all went well; the line that includes it is left for us.
    """
    lines = _read_auto_conf(data_directory).split("\n")
    _write_auto_conf(data_directory, "\n".join(line for line in lines if not _is_include(line)))
    remove_durably(data_directory / RECOVERY_SETTINGS_FILE)


# Values may be in any encoding; as Latin-1 every byte comes back as it was.
def _read_auto_conf(data_directory: Path) -> str:
    try:
        return (data_directory / AUTO_CONF).read_bytes().decode("latin-1")
    except FileNotFoundError:
        return ""


def _write_auto_conf(data_directory: Path, text: str) -> None:
    replace_durably(data_directory / AUTO_CONF, text.encode("latin-1"))
