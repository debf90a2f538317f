"""Repositories written by WAL-G are restored by the real `pitr restore` to exactly the rows that were there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.lab.postgres import PostgresCluster
from agent.restore.marker import MARKER_NAME
from tests.support.agent_process import RunPitr
from tests.support.postgres import FindBinaries
from tests.support.walg_buckets import RecoveryPoint, answers, needs_walg_buckets, recovery_points, restore_settings

# Whole, as every reader must: plain, branched, and of the oldest version with a delta.
WHOLE = ("pg15-lz4-full", "pg15-timelines", "pg13-lz4-16mb")
IN_PART = ("pg15-lzma", "pg15-libsodium-hex", "pg16-tablespaces", "pg17-zstd-delta")
REACHABLE = [
    point for name in (*WHOLE, *IN_PART) for point in recovery_points(name, reachable=True, every_target=name in WHOLE)
]
UNREACHABLE = [point for name in (*WHOLE, *IN_PART) for point in recovery_points(name, reachable=False)]
pytestmark = needs_walg_buckets

SettingsOf = Callable[[RecoveryPoint], dict[str, str]]


@pytest.fixture
def settings_of(lab_directory: Path, hook_directory: Path, postgres_binaries: FindBinaries) -> SettingsOf:
    """Makes the settings that restore a point; see `restore_settings`."""
    return lambda point: restore_settings(point, lab_directory, hook_directory, postgres_binaries(point.bucket.major))


@pytest.mark.parametrize("point", REACHABLE, ids=str)
def test_a_recovery_point_is_restored_to_exactly_its_rows(
    point: RecoveryPoint, settings_of: SettingsOf, pitr: RunPitr, postgres_binaries: FindBinaries
) -> None:
    settings = settings_of(point)
    done = pitr("restore", settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    data_directory = Path(settings["PGDATA"])
    marker = json.loads((data_directory / MARKER_NAME).read_text())
    assert marker["stage"] == "promoted"
    assert marker["backup"] == (point.backup or point.expected["nearest_backup"])
    with PostgresCluster(data_directory, postgres_binaries(point.bucket.major)) as cluster:
        cluster.start()
        assert answers(cluster, point) == point.answers
        assert cluster.value("SHOW archive_mode") == "off"
        assert "shut down at" in cluster.log_tail(), "the restore stopped its server cleanly"
        cluster.stop()


@pytest.mark.parametrize("point", UNREACHABLE, ids=str)
def test_a_target_that_cannot_be_reached_is_refused_before_anything_is_written(
    point: RecoveryPoint, settings_of: SettingsOf, pitr: RunPitr
) -> None:
    settings = settings_of(point)
    done = pitr("restore", settings=settings)
    assert done.returncode == 40, done.stdout + done.stderr
    assert point.value in done.stderr or point.target == "TARGET_TIME"
    data_directory = Path(settings["PGDATA"])
    assert not data_directory.exists() or list(data_directory.iterdir()) == []


def test_the_nearest_moment_before_a_gap_is_told_and_can_be_restored(
    settings_of: SettingsOf, pitr: RunPitr, postgres_binaries: FindBinaries
) -> None:
    points = [p for p in recovery_points("pg15-lz4-full", reachable=True) if p.target == "TARGET_TIME"]
    settings = settings_of(max(points, key=lambda point: point.value))
    needed = json.loads(pitr("restore", "--plan", "--json", settings=settings).stdout)["wal"]
    lost = f"{int(needed['last'], 16) - 3:024X}"
    for path in Path(settings["WALG_FILE_PREFIX"], "wal_005").glob(f"{lost}*"):
        path.unlink()
    refused = pitr("restore", "--plan", "--json", settings=settings)
    assert refused.returncode == 40, refused.stderr
    answer = json.loads(refused.stdout)
    assert lost in answer["reason"]
    (gap,) = json.loads(pitr("window", "--json", settings=settings).stdout)["gaps"]
    assert (gap["first_missing"], gap["last_missing"], gap["segments"]) == (lost, lost, 1)

    done = pitr("restore", settings={**settings, "TARGET_TIME": answer["nearest"]["before"]})
    assert done.returncode == 0, done.stdout + done.stderr
    marker = json.loads((Path(settings["PGDATA"]) / MARKER_NAME).read_text())
    assert marker["last_commit_at"] == answer["nearest"]["before"]
