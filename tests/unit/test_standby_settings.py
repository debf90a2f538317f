"""How a standby reaches its primary, without its password showing."""

import re
import struct
from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import given
from hypothesis.strategies import characters, text

from agent.domain.control_file import parse_control_file
from agent.domain.wal import segment_name
from agent.errors import ConfigError
from agent.postgres.conninfo import password_line, split_password
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.restore.recovery_settings import standby_settings
from agent.restore.standby import raised_limits
from agent.settings import Compression
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.progress import Progress
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter
from tests.support.walg_backup import SMALL, BackupContent, control_file, plan_of

PASSWORDS = text(characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


@given(PASSWORDS)
def test_a_password_is_taken_out_of_the_conninfo_and_its_line_has_one_field(password: str) -> None:
    quoted = password.replace("\\", "\\\\").replace("'", "\\'")
    rest, found = split_password(f"host=primary password='{quoted}' user=replicator")
    assert (sorted(rest.split()), found) == (["host=primary", "user=replicator"], password)
    line = password_line(password)
    assert re.fullmatch(r"\*:\*:\*:\*:(\\.|[^:\\])*\n", line)
    assert re.sub(r"\\(.)", r"\1", line.removeprefix("*:*:*:*:").removesuffix("\n")) == password


def test_a_url_is_understood_and_a_wrong_one_not_repeated() -> None:
    assert split_password("postgresql://u:p%40ss@primary:5433/?sslmode=require")[1] == "p@ss"
    with pytest.raises(ConfigError) as raised:
        split_password("s3cret without equals sign")
    assert "s3cret" not in raised.value.one_line()
    with pytest.raises(ConfigError, match="line break"):
        split_password("password='a\nb'")


def test_a_standby_has_no_target_and_never_ends_by_itself() -> None:
    settings = standby_settings("wal-restore.sh %f %p", "host=primary")
    assert {name: value for name, value in settings.items() if name.startswith("recovery_target") and value} == {
        "recovery_target_inclusive": "on",
        "recovery_target_timeline": "latest",
        "recovery_target_action": "pause",
    }
    assert (settings["primary_conninfo"], settings["hot_standby"]) == ("host=primary", "on")


@pytest.mark.parametrize("is_damaged", [False, True])
async def test_damaged_wal_keeps_no_standby_from_being_made_and_hides_no_limit_before_it(is_damaged: bool) -> None:
    writer, store = WalWriter(), MemoryObjectStore()
    writer.record(0, 0x60, struct.pack("<6iBB", 40, 20, 12, 5, 100, 1, 0, 0))
    while writer.lsn < 6.5 * SEGMENT_BYTES:
        writer.filler(7000)
    writer.record(0, 0x60, struct.pack("<6iBB", 30, 20, 12, 5, 200, 1, 0, 0))
    names = [segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES) for number in range(1, 7)]
    for name, content in zip(names, writer.segments(), strict=True):
        await store.put(f"wal_005/{name}", content)
    if is_damaged:
        await store.put(f"wal_005/{names[-1]}", bytes(SEGMENT_BYTES))
    plan = plan_of(BackupContent(parts=[SMALL]))
    plan = replace(plan, backup=replace(plan.backup, system_identifier=SYSTEM_IDENTIFIER), segments=names)
    archive = WalArchive(store, ObjectFormat(Compression.NONE, None))
    control = replace(parse_control_file(control_file(), google_crc32c.value), max_connections=50)
    reported: list[Progress] = []
    limits = await raised_limits(archive, plan, control, reported.append)
    assert limits == {
        "max_worker_processes": 20,
        "max_wal_senders": 12,
        "max_prepared_transactions": 5,
        "max_locks_per_transaction": 100 if is_damaged else 200,
    }
    assert reported[0] == Progress("preparing", 4 * SEGMENT_BYTES, 6 * SEGMENT_BYTES)
    assert [each.ratio for each in reported[1:]] == ([] if is_damaged else [1.0])
