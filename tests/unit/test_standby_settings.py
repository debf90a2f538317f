"""How a standby reaches its primary, without its password showing."""

import re

import pytest
from hypothesis import given
from hypothesis.strategies import characters, text

from agent.errors import ConfigError
from agent.postgres.conninfo import password_line, split_password
from agent.restore.recovery_settings import standby_settings

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
