"""Over the data directory of a stopped server, a restore writes only what differs, and asks before it is too late."""

from pathlib import Path

from agent.domain.lsn import format_lsn
from agent.domain.wal_records import RecordKind
from agent.domain.wal_scan import scan_segment
from agent.lab.privileges import hand_over
from agent.restore.existing import FORMER_CONTROL_FILE
from agent.restore.marker import MARKER_NAME
from tests.support.agent_process import RunPitr
from tests.support.base_backup import start_lab
from tests.support.postgres import MakeCluster
from tests.support.wal_sources import join_records


def nothing(_: object) -> None:
    """Report to nobody."""


async def test_a_server_is_taken_back_to_its_base_backup(
    make_cluster: MakeCluster, lab_directory: Path, hook_directory: Path, pitr: RunPitr
) -> None:
    cluster = make_cluster()
    lab = start_lab(cluster, lab_directory)
    for name in ("space", "later"):
        (lab_directory / name).mkdir()
        hand_over(lab_directory / name)
    cluster.execute(
        f"CREATE TABLESPACE space LOCATION '{lab_directory}/space'",
        "CREATE TABLE untouched AS SELECT i FROM generate_series(1, 20000) i",
        "CREATE TABLE changed TABLESPACE space AS SELECT 1 AS i",
        "VACUUM FREEZE",
        "CHECKPOINT",
    )
    untouched = cluster.data_directory / str(cluster.value("SELECT pg_relation_filepath('untouched')"))
    before = untouched.stat()
    await lab.taker().take(nothing)
    cluster.execute(
        "UPDATE changed SET i = 2",
        f"CREATE TABLESPACE later LOCATION '{lab_directory}/later'",
        "CREATE TABLE new TABLESPACE later AS SELECT 1",
        "CREATE DATABASE another",
    )
    predecessors = [lab_directory / name / "PG_12_201909212" / "5" / "16384" for name in ("space", "later")]
    for path in predecessors:  # as pg_upgrade leaves them, until they are deleted
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of another server")
        hand_over(path.parents[1])
    cluster.wait_until_archived(cluster.switch_wal())
    for path in lab.store.root.rglob("*"):
        hand_over(path)
    settings = {
        "WALG_FILE_PREFIX": str(lab.store.root),
        "PGDATA": str(cluster.data_directory),
        "TARGET_IMMEDIATE": "true",
        "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(cluster.binaries.directory),
        "PITR_HOOK_DIR": str(hook_directory),
        "PITR_SOCKET": str(lab_directory / "agent.sock"),
    }
    over = {**settings, "PITR_RESTORE_DELTA": "true"}

    running = pitr("restore", settings=over)
    assert running.returncode == 10
    assert "a server runs in" in running.stderr
    assert cluster.value("SELECT i FROM changed") == 2
    cluster.stop()
    refused = pitr("restore", settings=settings)
    assert refused.returncode == 10
    assert "PITR_RESTORE_DELTA=true" in refused.stderr
    waiting = cluster.data_directory / "pg_wal" / "archive_status" / "000000010000000000000001.ready"
    waiting.touch()
    unarchived = pitr("restore", settings=over)
    assert unarchived.returncode == 10
    assert "may not be archived" in unarchived.stderr
    assert not (cluster.data_directory / MARKER_NAME).exists()
    waiting.unlink()

    done = pitr("restore", settings=over)
    assert done.returncode == 0, done.stderr
    after = untouched.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (cluster.data_directory / FORMER_CONTROL_FILE).exists()
    assert [path.read_bytes() for path in predecessors] == [b"of another server"] * 2
    assert [path.name for path in (lab_directory / "later").iterdir()] == ["PG_12_201909212"]
    cluster.start()
    assert cluster.value("SELECT i FROM changed") == 1
    assert cluster.value("SELECT count(*) FROM untouched") == 20000
    assert (
        cluster.value("SELECT string_agg(spcname, ' ' ORDER BY 1) FROM pg_tablespace") == "pg_default pg_global space"
    )
    assert cluster.value("SELECT count(*) FROM pg_database WHERE datname = 'another'") == 0
    cluster.execute("UPDATE changed SET i = 3")
    cluster.stop()
    assert pitr("restore", settings=over).returncode == 0, "it is done already"
    cluster.start()
    assert cluster.value("SELECT i FROM changed") == 3


async def test_beside_its_server_a_restore_does_not_replay_a_newer_tablespace_into_the_files_of_that(
    make_cluster: MakeCluster, lab_directory: Path, hook_directory: Path, pitr: RunPitr
) -> None:
    cluster = make_cluster()
    lab = start_lab(cluster, lab_directory)
    (lab_directory / "later").mkdir()
    hand_over(lab_directory / "later")
    await lab.taker().take(nothing)
    cluster.execute(
        f"CREATE TABLESPACE later LOCATION '{lab_directory}/later'",
        "CREATE TABLE new TABLESPACE later AS SELECT 1 AS i",
        "SELECT pg_create_restore_point('early')",
        "UPDATE new SET i = 2",
        "CHECKPOINT",
    )
    segment = cluster.switch_wal()
    cluster.wait_until_archived(segment)
    records = join_records([scan_segment((cluster.data_directory / "pg_wal" / segment).read_bytes())])
    made_at = format_lsn(next(record.lsn for record in records if record.kind is RecordKind.TABLESPACE))
    for path in lab.store.root.rglob("*"):
        hand_over(path)
    settings = {
        "WALG_FILE_PREFIX": str(lab.store.root),
        "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(cluster.binaries.directory),
        "PITR_HOOK_DIR": str(hook_directory),
        "PITR_SOCKET": str(lab_directory / "agent.sock"),
    }
    for target in ({"TARGET_NAME": "early"}, {"TARGET_LSN": made_at}):
        refused = pitr("restore", settings={**settings, **target, "PGDATA": str(lab_directory / "early")})
        assert refused.returncode == 10, refused.stderr
        assert f"a tablespace in {lab_directory}/later was made after base backup" in refused.stderr
        assert not (lab_directory / "early" / MARKER_NAME).exists()
    before = {"TARGET_LSN": made_at, "TARGET_INCLUSIVE": "false", "PGDATA": str(lab_directory / "before")}
    done = pitr("restore", settings={**settings, **before})
    assert done.returncode == 0, done.stderr
    cluster.stop()
    cluster.start()
    assert cluster.value("SELECT i FROM new") == 2
