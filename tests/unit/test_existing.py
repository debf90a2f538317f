"""Going through what lies in a data directory."""

import tracemalloc
from pathlib import Path

from agent.restore.existing import directories_below


def test_directories_come_after_those_in_them_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    top = tmp_path / "top"
    (top / "base/5").mkdir(parents=True)
    (top / "base/5/16384").touch()
    (top / "pg_wal").symlink_to(tmp_path / "elsewhere")
    assert list(directories_below(top)) == [top / "base/5", top / "base", top]


def test_what_a_volume_keeps_for_root_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "base").mkdir()
    assert list(directories_below(tmp_path)) == [tmp_path / "base", tmp_path]


def test_a_directory_of_many_files_takes_no_memory_for_each(tmp_path: Path) -> None:
    files = 10_000
    for number in range(files):
        (tmp_path / str(number)).touch()
    tracemalloc.start()
    try:
        assert list(directories_below(tmp_path)) == [tmp_path]
        assert tracemalloc.get_traced_memory()[1] < 8 * files
    finally:
        tracemalloc.stop()
