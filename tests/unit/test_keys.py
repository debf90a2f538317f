"""Objects have WAL-G's names."""

from hypothesis import given
from hypothesis import strategies as st

from agent.repository import keys

BACKUP = "base_000000010000000000000016_D_00000001000000000000000F"


def test_the_objects_of_a_backup_are_where_wal_g_looks_for_them() -> None:
    assert keys.sentinel_key(BACKUP) == f"basebackups_005/{BACKUP}_backup_stop_sentinel.json"
    assert keys.metadata_key(BACKUP) == f"basebackups_005/{BACKUP}/metadata.json"
    assert keys.files_metadata_key(BACKUP) == f"basebackups_005/{BACKUP}/files_metadata.json"
    assert keys.tar_folder(BACKUP) == f"basebackups_005/{BACKUP}/tar_partitions/"


def test_a_wal_file_keeps_its_name_before_the_codecs_extension() -> None:
    assert keys.wal_key("00000002.history", ".lz4") == "wal_005/00000002.history.lz4"


def test_part_numbers_have_at_least_three_digits() -> None:
    assert keys.tar_part_name(1, ".zst") == "part_001.tar.zst"
    assert keys.tar_part_name(1000, "") == "part_1000.tar"


def test_a_sentinels_key_gives_back_the_backups_name() -> None:
    assert keys.backup_name_of_sentinel(keys.sentinel_key(BACKUP)) == BACKUP


def test_foreign_and_lower_case_names_are_no_backups() -> None:
    for name in ("base_00000001000000000000000f", "mine", "", "base_", f"x/{BACKUP}"):
        assert keys.backup_name_of_sentinel(keys.sentinel_key(name)) is None


@given(st.text())
def test_any_key_has_an_answer(key: str) -> None:
    assert keys.backup_name_of_sentinel(key) is None
