"""Files in PGDATA: whole or absent, never half."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.postgres.durable import locked_directory, remove_durably, replace_durably


def test_a_file_is_replaced_with_content_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    replace_durably(path, b"new", mode=0o640)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Lets this process write files of at most 1 KiB: a full volume fails likewise."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files_only")
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="File too large"):
        replace_durably(path, bytes(4096))
    assert path.read_bytes() == b"old"
    replace_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path], "what the first attempt left is gone"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (tmp_path / "file.pitr-new").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        replace_durably(tmp_path / "file", b"new")
    assert outside.read_bytes() == b"untouched"


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remove_durably(tmp_path / "file")
    remove_durably(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    hold = "import fcntl,os,sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", hold, os.fspath(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(BlockingIOError), locked_directory(tmp_path):
            pass
        other.kill()
    with locked_directory(tmp_path), pytest.raises(BlockingIOError), locked_directory(tmp_path):
        pass
    with locked_directory(tmp_path):
        pass
