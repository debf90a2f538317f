"""What of a data directory goes into a base backup, rule by rule."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.errors import BackupFailed
from agent.postgres.data_directory import DataDirectory
from agent.postgres.data_files import DataFile, approximate_bytes, tablespaces, walk

VERSION_DIRECTORY = "PG_15_202209061"
DIRECTORIES = [
    "base/1", "base/5", "global", "log", "pg_dynshmem", "pg_logical/snapshots", "pg_notify", "pg_replslot/slot",
    "pg_serial", "pg_snapshots", "pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase",
    "pg_wal/archive_status", "pg_xact",
]  # fmt: skip


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    """A directory that looks like a data directory."""
    root = tmp_path / "pgdata"
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    put(root, "PG_VERSION", "global/pg_filenode.map", "global/pg_control", "global/1262", "pg_xact/0000", "base/5/1259")
    return root


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content")


def walk_all(root: Path) -> Iterator[DataFile]:
    return walk(root, VERSION_DIRECTORY, tablespaces(root))


def names_in(root: Path) -> list[str]:
    return [file.name for file in walk_all(root)]


def files_added(root: Path, *names: str) -> set[str]:
    """Return which of the files `names`, put into the data directory, are in the backup."""
    put(root, *names)
    return {name for name in names_in(root) if name[1:] in names}


def test_the_data_directory_itself_comes_first_and_a_directory_before_what_is_in_it(pgdata: Path) -> None:
    names = names_in(pgdata)
    assert names[0] == "/"
    assert names.index("/base") < names.index("/base/5") < names.index("/base/5/1259")
    assert len(set(names)) == len(names)


def test_how_much_it_is_is_known_before_nearly(pgdata: Path, tmp_path: Path) -> None:
    put(pgdata, "base/5/16384", "base/5/16385", "pg_wal/000000010000000000000001", "log/postgresql.log")
    put(tmp_path / "space" / VERSION_DIRECTORY, "5/16385")
    put(tmp_path / "space" / "PG_14_202107181", "5/16385")
    (pgdata / "pg_tblspc" / "16390").symlink_to(tmp_path / "space")
    (pgdata / "pg_tblspc" / "16391").symlink_to(tmp_path / "gone")
    spaces = tablespaces(pgdata)
    exact = sum(file.size for file in walk(pgdata, VERSION_DIRECTORY, {16390: spaces[16390]}))
    links = sum(os.lstat(pgdata / "pg_tblspc" / str(oid)).st_size for oid in spaces)
    control_file = len(b"content")
    assert approximate_bytes(pgdata, VERSION_DIRECTORY, spaces) == exact + links + control_file


def test_a_file_that_vanishes_meanwhile_takes_no_other_out_of_the_count(
    pgdata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(pgdata, *(f"base/5/{number}" for number in range(16384, 16394)))
    listing = os.scandir

    @contextmanager
    def dropping(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with listing(folder) as entries:
            listed = list(entries)
        if folder == str(pgdata / "base/5"):
            Path(listed[0].path).unlink()
        yield iter(listed)

    monkeypatch.setattr(os, "scandir", dropping)
    before = approximate_bytes(pgdata, VERSION_DIRECTORY, {})
    monkeypatch.undo()
    assert before == approximate_bytes(pgdata, VERSION_DIRECTORY, {}) > 0


def test_pg_control_is_left_to_be_stored_last(pgdata: Path) -> None:
    assert "/global/pg_control" not in names_in(pgdata)
    assert files_added(pgdata, "contrib/pg_control") == {"/contrib/pg_control"}


@pytest.mark.parametrize(
    "name",
    ["pg_wal/000000010000000000000001", "pg_replslot/slot/state", "pg_notify/0000", "pg_stat_tmp/db_0.stat",
     "log/a.log", "pg_dynshmem/mmap.1", "pg_serial/0000", "pg_snapshots/1", "pg_subtrans/0000",
     "base/pgsql_tmp/pgsql_tmp1.0", "global/pgsql_tmp/x", "pg_wal/archive_status/000000010000000000000001.ready"],
)  # fmt: skip
def test_an_emptied_directory_keeps_its_entry_and_loses_its_content(pgdata: Path, name: str) -> None:
    assert files_added(pgdata, name) == set()
    emptied = name.split("/")[0] if name.startswith(("pg_", "log")) else name.rpartition("/")[0]
    assert f"/{emptied}" in names_in(pgdata)


@pytest.mark.parametrize(
    "name",
    ["postmaster.pid", "postmaster.opts", "backup_label", "backup_label.old", "tablespace_map", "tablespace_map.old",
     "standby.signal", "recovery.signal", "recovery.conf", "backup_manifest", "postgresql.auto.conf.tmp",
     "current_logfiles", "current_logfiles.tmp", ".DS_Store",
     "global/pg_internal.init", "base/5/pg_internal.init.123", "pgsql_tmp123.0",
     "base/5/t3_16384", "base/5/t3_16384_fsm", "base/5/t3_16384.1", "pitr.restore.json", "global/pg_control.pitr-new"],
)  # fmt: skip
def test_a_file_that_belongs_to_this_server_or_moment_is_left_out(pgdata: Path, name: str) -> None:
    assert files_added(pgdata, name) == set()


@pytest.mark.parametrize(
    "name",
    ["postgresql.auto.conf", "postgresql.conf", "backup_label.mine", "t3_16384", "base/5/table",
     "base/5/t3_x", "base/t3_16384", "global/16384", "base/5/16384_init", "base/5/16384_vm", "pg_stat/pgstat.stat"],
)  # fmt: skip
def test_other_files_are_kept(pgdata: Path, name: str) -> None:
    assert files_added(pgdata, name) == {f"/{name}"}


def test_lost_and_found_is_not_entered(pgdata: Path) -> None:
    (pgdata / "lost+found").mkdir()
    assert "/lost+found" not in names_in(pgdata)


def test_of_an_unlogged_relation_only_the_init_fork_is_kept(pgdata: Path) -> None:
    unlogged = ["base/5/20000", "base/5/20000_fsm", "base/5/20000_vm", "base/5/20000.1", "base/5/20000_fsm.1"]
    assert files_added(pgdata, *unlogged, "base/5/20000_init", "base/5/200") == {"/base/5/20000_init", "/base/5/200"}
    assert files_added(pgdata, "base/1/20000") == {"/base/1/20000"}


def test_an_init_fork_that_appears_while_the_directory_is_read_counts(pgdata: Path) -> None:
    put(pgdata, "base/5/30000", "base/5/30001")
    walking = walk_all(pgdata)
    seen = [next(file for file in walking if file.name == "/base/5/30000")]
    put(pgdata, "base/5/30001_init")
    assert "/base/5/30001" not in [file.name for file in [*seen, *walking]]


def test_what_vanishes_while_the_directory_is_read_is_passed_over(pgdata: Path) -> None:
    put(pgdata, "base/5/30000", "base/6/1")
    walking = walk_all(pgdata)
    names = [next(file for file in walking if file.name == "/base/5").name]
    (pgdata / "base/5/30000").unlink()
    (pgdata / "base/6/1").unlink()
    (pgdata / "base/6").rmdir()
    names += [file.name for file in walking]
    assert "/base/5/1259" in names
    assert not {"/base/5/30000", "/base/6", "/base/6/1"} & set(names)


def test_a_database_dropped_after_its_entry_was_written_is_passed_over(pgdata: Path) -> None:
    put(pgdata, "base/6/1")
    walking = walk_all(pgdata)
    next(file for file in walking if file.name == "/base/6")
    (pgdata / "base/6/1").unlink()
    (pgdata / "base/6").rmdir()
    assert "/global/1262" in [file.name for file in walking]


@pytest.mark.parametrize("name", ["pg_xact", "base", "global", "pg_tblspc"])
def test_a_directory_that_no_server_can_do_without_must_not_vanish(pgdata: Path, name: str) -> None:
    walking = walk_all(pgdata)
    next(file for file in walking if file.name == f"/{name}")
    (pgdata / name).rename(pgdata / "moved")
    with pytest.raises(BackupFailed, match=f"{name} cannot be read: No such file"):
        list(walking)


@pytest.mark.parametrize("name", ["PG_VERSION", "global/pg_filenode.map"])
def test_a_directory_without_the_first_files_of_a_cluster_is_refused(pgdata: Path, name: str) -> None:
    (pgdata / name).unlink()
    with pytest.raises(BackupFailed, match=f"{name} is missing"):
        names_in(pgdata)


def test_a_link_to_a_file_or_directory_is_replaced_by_what_it_leads_to(pgdata: Path, tmp_path: Path) -> None:
    put(tmp_path / "etc", "postgresql.conf", "conf.d/a.conf")
    (pgdata / "postgresql.conf").symlink_to(tmp_path / "etc/postgresql.conf")
    (pgdata / "conf.d").symlink_to(tmp_path / "etc/conf.d")
    files = {file.name: file for file in walk_all(pgdata)}
    assert files["/postgresql.conf"].size == len(b"content")
    assert files["/conf.d"].is_directory
    assert Path(files["/conf.d/a.conf"].path).read_bytes() == b"content"


def test_a_linked_pg_wal_becomes_an_empty_directory(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "pg_wal/archive_status").rmdir()
    (pgdata / "pg_wal").rmdir()
    (pgdata / "pg_wal").symlink_to(tmp_path / "not mounted here")
    files = {file.name: file for file in walk_all(pgdata)}
    assert files["/pg_wal"].is_directory
    assert files["/pg_wal/archive_status"].is_directory
    assert [name for name in files if name.startswith("/pg_wal")] == ["/pg_wal", "/pg_wal/archive_status"]


def test_a_link_that_leads_nowhere_is_passed_over(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "server.key").symlink_to(tmp_path / "nowhere")
    assert "/server.key" not in names_in(pgdata)


def test_a_link_in_a_circle_is_refused(pgdata: Path) -> None:
    (pgdata / "pg_stat/again").symlink_to(pgdata)
    with pytest.raises(BackupFailed, match="pg_stat/again is a link to a directory that it is in"):
        names_in(pgdata)


def test_sockets_and_pipes_are_passed_over(pgdata: Path) -> None:
    os.mkfifo(pgdata / "pipe")
    assert "/pipe" not in names_in(pgdata)


def test_a_name_that_is_not_utf8_is_kept(pgdata: Path) -> None:
    Path(os.fsdecode(os.fsencode(pgdata) + b"/\xe9t\xe9")).touch()
    assert os.fsdecode(b"/\xe9t\xe9") in names_in(pgdata)


def test_a_directory_of_very_many_files_is_walked_whole(pgdata: Path) -> None:
    for number in range(25_000):
        (pgdata / "base" / "5" / str(number)).touch()
    names = names_in(pgdata)
    assert len(set(names)) == len(names)
    assert {f"/base/5/{number}" for number in range(25_000)} <= set(names)


def test_a_tablespace_is_stored_below_its_oid_without_entries_for_the_link_and_its_root(
    pgdata: Path, tmp_path: Path
) -> None:
    put(
        tmp_path / "space",
        f"{VERSION_DIRECTORY}/5/16400",
        f"{VERSION_DIRECTORY}/5/t3_1",
        "PG_14_202107181/5/1",
        "other",
    )
    (pgdata / "pg_tblspc/16384").symlink_to(tmp_path / "space")
    folder = f"/pg_tblspc/16384/{VERSION_DIRECTORY}"
    names = [name for name in names_in(pgdata) if name.startswith("/pg_tblspc")]
    assert names == ["/pg_tblspc", folder, f"{folder}/5", f"{folder}/5/16400"]
    assert tablespaces(pgdata) == {16384: str(tmp_path / "space")}


def test_a_tablespace_created_since_the_start_is_left_to_replay(pgdata: Path, tmp_path: Path) -> None:
    put(tmp_path / "space", f"{VERSION_DIRECTORY}/5/16400")
    (pgdata / "pg_tblspc/16384").symlink_to(tmp_path / "space")
    names = [file.name for file in walk(pgdata, VERSION_DIRECTORY, {})]
    assert [name for name in names if name.startswith("/pg_tblspc")] == ["/pg_tblspc"]


def test_a_tablespace_below_the_data_directory_is_stored_once(pgdata: Path) -> None:
    put(pgdata, f"spaces/a/{VERSION_DIRECTORY}/5/16400")
    (pgdata / "pg_tblspc/16384").symlink_to(pgdata / "spaces/a")
    names = names_in(pgdata)
    assert [name for name in names if name.endswith("16400")] == [f"/pg_tblspc/16384/{VERSION_DIRECTORY}/5/16400"]
    assert "/spaces/a" in names


def test_a_tablespace_in_place_is_an_ordinary_directory(pgdata: Path) -> None:
    put(pgdata, f"pg_tblspc/16384/{VERSION_DIRECTORY}/5/16400")
    assert f"/pg_tblspc/16384/{VERSION_DIRECTORY}/5/16400" in names_in(pgdata)
    assert tablespaces(pgdata) == {}


def test_a_tablespace_that_is_not_mounted_here_refuses_the_backup_by_name(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "pg_tblspc/16384").symlink_to(tmp_path / "not mounted")
    with pytest.raises(BackupFailed, match=r"tablespace 16384 in .*/not mounted cannot be read"):
        names_in(pgdata)


def test_a_tablespace_dropped_while_the_directory_is_read_is_passed_over(pgdata: Path, tmp_path: Path) -> None:
    put(tmp_path / "space", f"{VERSION_DIRECTORY}/5/16400")
    (pgdata / "pg_tblspc/16384").symlink_to(tmp_path / "space")
    walking = walk_all(pgdata)
    next(file for file in walking if file.name == "/pg_tblspc")
    (pgdata / "pg_tblspc/16384").unlink()
    assert "/pg_xact/0000" in [file.name for file in walking]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(pgdata: Path) -> None:
    (pgdata / "base").chmod(0)
    try:
        with pytest.raises(BackupFailed, match="base cannot be read: Permission denied"):
            names_in(pgdata)
    finally:
        (pgdata / "base").chmod(0o700)


@pytest.mark.parametrize(("sizes", "is_sound"), [
    ([8, 8, 3], True), ([8, 3, 0, 0], True), ([0, 0], True), ([8, 8], True),
    ([8, 3, 8], False), ([8, None, 1], False), ([None, 8], False), ([7, 1], False),
])  # fmt: skip
def test_a_relation_with_a_hole_is_refused(pgdata: Path, sizes: list[int | None], is_sound: bool) -> None:
    for number, size in enumerate(sizes):
        if size is not None:
            (pgdata / "base" / "5" / ("16384" + (f".{number}" if number else ""))).write_bytes(bytes(size))
    files = walk(pgdata, VERSION_DIRECTORY, {}, segment_bytes=8, hole_seconds=0)
    if is_sound:
        assert f"/base/5/16384.{len(sizes) - 1}" in {file.name for file in files}
    else:
        with pytest.raises(BackupFailed, match="the part of the relation before it"):
            list(files)


def test_a_relation_that_is_dropped_meanwhile_has_no_hole(pgdata: Path) -> None:
    second = pgdata / "base" / "5" / "16384.1"  # of a first that is gone already
    second.write_bytes(bytes(8))
    timer = threading.Timer(0.2, second.unlink)
    timer.start()
    list(walk(pgdata, VERSION_DIRECTORY, {}, segment_bytes=8, hole_seconds=60))
    timer.join()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look anywhere")
def test_a_data_directory_that_may_not_be_looked_into_is_not_taken_for_none(pgdata: Path) -> None:
    (pgdata / "PG_VERSION").write_text("18\n")
    assert DataDirectory(pgdata).exists()
    assert not DataDirectory(pgdata / "PG_VERSION").exists()
    pgdata.chmod(0)
    try:
        with pytest.raises(PermissionError):
            DataDirectory(pgdata).exists()
    finally:
        pgdata.chmod(0o700)
    (pgdata / "PG_VERSION").unlink()
    assert not DataDirectory(pgdata).exists()
