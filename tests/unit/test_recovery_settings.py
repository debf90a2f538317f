"""The recovery settings: PostgreSQL reads back what was meant, and nothing else acts."""

import re
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis.strategies import booleans, characters, datetimes, integers, just, sampled_from, text, timezones

from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.server_checks import RECOVERY_SETTINGS_FILE
from agent.errors import ConfigError
from agent.restore.recovery_settings import (
    AUTO_CONF,
    RECOVERY_SIGNAL,
    STANDBY_SIGNAL,
    postgres_time,
    recovery_settings,
    remove_recovery_settings,
    render_settings,
    restore_command,
    without_recovery_settings,
    write_recovery_settings,
)

FIVE_TARGETS = {f"recovery_target{kind}" for kind in ("", "_lsn", "_name", "_time", "_xid")}
WRITABLE = text(characters(exclude_categories=["Cc", "Cs"]))
COMMAND = "/usr/local/bin/wal-restore.sh %f %p"


def parse_configuration(content: str) -> dict[str, str]:
    """Read a configuration file as PostgreSQL does, for quoted values.

    Source: guc-file.l: tokens of a line; GUC_scanstr(): escapes within quotes. The last of equal names wins.
    """
    settings: dict[str, str] = {}
    for line in content.split("\n"):
        if not line.strip(" \t\r") or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z_.]+)[ \t]*=?[ \t]*'((?:[^'\\\n]|\\.|'')*)'[ \t\r]*(?:#.*)?", line)
        assert match is not None, f"syntax error in {line!r}"
        settings[match[1].lower()] = re.sub(r"\\(.)|''", lambda found: found[1] or "'", match[2])
    return settings


@given(WRITABLE)
@example("x'\\'\\\\")
@example("x' # ")
def test_a_rendered_value_reads_back_as_the_value(value: str) -> None:
    rendered = render_settings({"recovery_target_name": value, "hot_standby": "off"})
    assert parse_configuration(rendered) == {"recovery_target_name": value, "hot_standby": "off"}


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\t", "\x7f", "\udcff"])
def test_a_value_that_cannot_be_written_is_refused(character: str) -> None:
    with pytest.raises(ConfigError, match="recovery_target_name"):
        render_settings({"recovery_target_name": f"x'{character}archive_command='evil"})


def test_a_hostile_restore_point_writes_nothing(tmp_path: Path) -> None:
    target = RestoreTarget(TargetKind.NAME, name="x'\nshared_preload_libraries='evil")
    with pytest.raises(ConfigError):
        write_recovery_settings(tmp_path, recovery_settings(target, COMMAND), keep_archiving=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (RestoreTarget(TargetKind.IMMEDIATE), "recovery_target", "immediate"),
        (RestoreTarget(TargetKind.LSN, lsn=0x16_B374D848), "recovery_target_lsn", "16/B374D848"),
        (RestoreTarget(TargetKind.NAME, name="before drop"), "recovery_target_name", "before drop"),
        (RestoreTarget(TargetKind.XID, xid=743), "recovery_target_xid", "743"),
        (
            RestoreTarget(TargetKind.TIME, time=datetime(2026, 11, 22, 19, 53, 41, tzinfo=UTC)),
            "recovery_target_time",
            "2026-11-22 19:53:41.000000+00",
        ),
        (RestoreTarget(), None, ""),
    ],
)
def test_one_target_is_set_and_the_others_are_cancelled(target: RestoreTarget, name: str | None, value: str) -> None:
    settings = recovery_settings(replace(target, timeline="7"), COMMAND)
    assert {key: value for key, value in settings.items() if key in FIVE_TARGETS and value} == (
        {} if name is None else {name: value}
    )
    assert set(settings) >= FIVE_TARGETS
    assert settings["recovery_target_timeline"] == "7"
    assert settings["recovery_target_action"] == "promote"


@given(datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=timezones()))  # noqa: DTZ001
@example(datetime(2026, 11, 22, 19, 53, 41, tzinfo=timezone(timedelta(hours=-5))))
def test_a_time_is_written_in_utc_to_the_microsecond_and_never_with_z(moment: datetime) -> None:
    written = postgres_time(moment)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\+00", written)
    assert datetime.fromisoformat(f"{written}:00") == moment.astimezone(UTC)


@given(WRITABLE.filter(lambda name: "/" not in name and name not in ("", ".", "..")))
@example("bin; touch %p")
@example("it's $HOME")
def test_the_shell_runs_the_hook_of_any_directory(folder: str) -> None:
    command = restore_command(Path("/") / folder)
    # As BuildRestoreCommand() does it.
    replaced = re.sub(r"%(.)", lambda found: {"f": "NAME", "p": "PATH", "%": "%"}[found[1]], command)
    arguments = subprocess.run(["sh", "-c", f"printf '%s\\n' {replaced}"], capture_output=True, check=True).stdout
    assert arguments.decode().split("\n")[:3] == [f"/{folder}/wal-restore.sh", "NAME", "PATH"]


LEFT_BY_AN_EARLIER_RECOVERY = """\
# Do not edit this file manually!
shared_buffers = '128MB'
recovery_target_time = '2020-01-01 00:00:00+00'
Recovery_Target_Name='old'
  restore_command 'cp /archive/%f %p'
recovery_end_command = 'x'
recovery_min_apply_delay = '6h'
primary_conninfo = 'host=primary'
primary_slot_name = 'slot'
promote_trigger_file = '/tmp/x'
archive_cleanup_command = 'pg_archivecleanup /archive %r'
recovery_prefetch = 'on'
archive_command = 'wal-g wal-push %p'
archive_mode='on'
work_mem = '1MB'
"""


def test_settings_of_an_earlier_recovery_and_of_a_standby_are_dropped_and_all_others_kept() -> None:
    kept = without_recovery_settings(LEFT_BY_AN_EARLIER_RECOVERY, keep_archiving=False)
    assert kept == (
        "# Do not edit this file manually!\nshared_buffers = '128MB'\nrecovery_prefetch = 'on'\nwork_mem = '1MB'\n"
    )


def test_the_successor_keeps_its_archiving() -> None:
    kept = without_recovery_settings(LEFT_BY_AN_EARLIER_RECOVERY, keep_archiving=True)
    assert "archive_command = 'wal-g wal-push %p'\narchive_mode='on'\n" in kept
    assert "archive_cleanup_command" not in kept


@given(
    text(characters(max_codepoint=255, exclude_characters="\n")), sampled_from(["", " ", "#", "'", "0", "work_mem="])
)
def test_other_lines_are_kept_byte_for_byte(rest: str, start: str) -> None:
    line = f"{start}|{rest}"
    kept = without_recovery_settings(f"{line}\nrecovery_target_xid = '1'\n{line}", keep_archiving=False)
    assert kept == f"{line}\n{line}"


def test_what_is_written_names_every_setting_that_another_recovery_left(tmp_path: Path) -> None:
    (tmp_path / AUTO_CONF).write_text(LEFT_BY_AN_EARLIER_RECOVERY)
    settings = recovery_settings(RestoreTarget(TargetKind.XID, xid=5), COMMAND)
    write_recovery_settings(tmp_path, settings, keep_archiving=False)
    assert parse_configuration((tmp_path / RECOVERY_SETTINGS_FILE).read_text()) == settings
    auto_conf = parse_configuration((tmp_path / AUTO_CONF).read_text())
    assert auto_conf["archive_mode"] == "off"
    assert auto_conf["include_if_exists"] == RECOVERY_SETTINGS_FILE


@given(first=integers(1, 5), keep_archiving=booleans(), content=just(LEFT_BY_AN_EARLIER_RECOVERY) | just(""))
def test_writing_again_after_a_crash_gives_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, first: int, keep_archiving: bool, content: str
) -> None:
    directory = tmp_path_factory.mktemp("data")
    (directory / AUTO_CONF).write_text(content)
    settings = recovery_settings(RestoreTarget(), COMMAND)
    seen = set()
    for _ in range(first + 1):
        write_recovery_settings(directory, settings, keep_archiving=keep_archiving)
        seen.add(tuple((path.name, path.read_bytes()) for path in sorted(directory.iterdir())))
    assert len(seen) == 1


def test_exactly_one_signal_file_is_left(tmp_path: Path) -> None:
    (tmp_path / STANDBY_SIGNAL).touch()
    write_recovery_settings(tmp_path, recovery_settings(RestoreTarget(), COMMAND), keep_archiving=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECOVERY_SETTINGS_FILE, AUTO_CONF, RECOVERY_SIGNAL]


def test_after_promotion_only_archiving_stays_off(tmp_path: Path) -> None:
    (tmp_path / AUTO_CONF).write_bytes(b"application_name = '\xff'\nrecovery_target_xid = '1'")
    write_recovery_settings(tmp_path, recovery_settings(RestoreTarget(), COMMAND), keep_archiving=False)
    remove_recovery_settings(tmp_path)
    assert not (tmp_path / RECOVERY_SETTINGS_FILE).exists()
    content = (tmp_path / AUTO_CONF).read_bytes().decode("latin-1")
    assert parse_configuration(content) == {"application_name": "\xff", "archive_mode": "off"}
