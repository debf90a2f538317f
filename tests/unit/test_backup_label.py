import pytest
from hypothesis import given
from hypothesis.strategies import characters, dictionaries, integers, text

from agent.domain.backup_label import backup_history_name, parse_backup_label, parse_tablespace_map

LABEL = """START WAL LOCATION: 0/900028 (file 000000010000000000000009)
CHECKPOINT LOCATION: 0/900060
BACKUP METHOD: streamed
BACKUP FROM: primary
START TIME: 2026-11-22 20:38:23 UTC
LABEL: x
START TIMELINE: 1
"""
PATHS = text(characters(codec="utf-8", exclude_characters="\0"), min_size=1)


def test_a_label_tells_where_replay_begins() -> None:
    label = parse_backup_label(LABEL)
    assert (label.start_lsn, label.start_segment) == (0x900028, "000000010000000000000009")
    assert (label.checkpoint_lsn, label.timeline) == (0x900060, 1)
    assert (
        backup_history_name(label.start_segment, label.start_lsn, 1 << 20) == "000000010000000000000009.00000028.backup"
    )


@pytest.mark.parametrize("line", [0, 1, 6])
def test_a_label_without_a_line_that_recovery_needs_is_refused(line: int) -> None:
    lines = LABEL.splitlines(keepends=True)
    del lines[line]
    with pytest.raises(ValueError, match="backup_label lacks"):
        parse_backup_label("".join(lines))


def escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\\n").replace("\r", "\\\r")


@given(dictionaries(integers(1, 2**32 - 1), PATHS))
def test_a_tablespace_map_is_read_as_postgresql_writes_it(tablespaces: dict[int, str]) -> None:
    written = "".join(f"{oid} {escape(path)}\n" for oid, path in tablespaces.items())
    assert parse_tablespace_map(written) == tablespaces
