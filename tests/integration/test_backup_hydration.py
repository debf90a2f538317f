"""What hydration makes of a base backup is what was backed up, by PostgreSQL's own proof."""

import asyncio
from pathlib import Path

import pytest

from agent.domain.delta_parent import DeltaPolicy
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.repository.keys import manifest_key
from agent.repository.wal_archive import WalArchive
from agent.restore.hydrate import claim, finish, hydrate
from agent.restore.marker import MARKER_NAME
from agent.restore.planner import plan_from_repository
from tests.support.agent_process import RunPitr
from tests.support.base_backup import BackupLab, rows_changing, start_lab
from tests.support.object_formats import ZSTD
from tests.support.postgres import FindBinaries, MakeCluster
from tests.support.recovered import verified


def nothing(_: object) -> None:
    """Report to nobody."""


@pytest.fixture
def verify_backup(postgres_binaries: FindBinaries) -> Path:
    """pg_verifybackup of version 18, which understands the manifests of all."""
    program = postgres_binaries(18)["postgres"].with_name("pg_verifybackup")
    if not program.exists():
        pytest.skip("this PostgreSQL 18 has no pg_verifybackup")
    return program


async def hydrated(lab: BackupLab, name: str, directory: Path, tablespace_map: dict[str, str]) -> None:
    archive = WalArchive(lab.store, ZSTD)
    plan = await plan_from_repository(lab.store, archive, RestoreTarget(TargetKind.IMMEDIATE), name)
    await claim(directory)
    await hydrate(lab.store, ZSTD, plan, directory, tablespace_map=tablespace_map, concurrency=2, report=nothing)
    await finish(directory)


def with_tablespaces(cluster: PostgresCluster, *locations: Path) -> None:
    for number, location in enumerate(locations):
        location.mkdir()
        hand_over(location)
        cluster.execute(
            f"CREATE TABLESPACE space{number} LOCATION '{location}'",
            f"CREATE TABLE t{number} TABLESPACE space{number} AS SELECT generate_series(1, 9)",
        )


@pytest.mark.parametrize("major", [15, 18])
async def test_pg_verifybackup_accepts_a_hydrated_backup_and_notices_a_changed_one(
    major: int, make_cluster: MakeCluster, lab_directory: Path, verify_backup: Path
) -> None:
    lab = start_lab(make_cluster(major), lab_directory)
    with_tablespaces(lab.cluster, lab_directory / "a", lab_directory / "b")
    (lab.cluster.data_directory / "other ü").write_text("content")
    hand_over(lab.cluster.data_directory / "other ü")
    with rows_changing(lab.cluster):
        backup = await lab.taker().take(nothing)
    restored = lab_directory / "restored"
    moved = {str(lab_directory / name): str(lab_directory / f"moved-{name}") for name in ("a", "b")}
    await hydrated(lab, backup.name, restored, moved)
    assert "backup successfully verified" in verified(verify_backup, restored)
    with (restored / "other ü").open("a") as file:
        file.write("!")
    (restored / "global" / "1260").unlink()
    said = verified(verify_backup, restored)
    assert '"other ü" has size 8 on disk but size 7 in the manifest' in said
    assert '"global/1260" is present in the manifest but not on disk' in said


async def test_pg_verifybackup_accepts_a_hydrated_delta(
    make_cluster: MakeCluster, lab_directory: Path, verify_backup: Path
) -> None:
    lab = start_lab(make_cluster(18, autovacuum=False), lab_directory)
    lab.cluster.execute("CREATE TABLE t AS SELECT i, 0 AS changed FROM generate_series(1, 20000) i", "CHECKPOINT")
    taker = lab.taker(deltas=DeltaPolicy(max_steps=1))
    full = await taker.take(nothing)
    lab.cluster.execute("UPDATE t SET changed = 1 WHERE i = 9")
    delta = await taker.take(nothing)
    assert delta.parent == full.name
    await hydrated(lab, delta.name, lab_directory / "restored", {})
    assert "backup successfully verified" in verified(verify_backup, lab_directory / "restored")


async def test_what_pitr_restore_leaves_is_proven_but_for_what_it_adds(
    make_cluster: MakeCluster, lab_directory: Path, hook_directory: Path, verify_backup: Path, pitr: RunPitr
) -> None:
    lab = start_lab(make_cluster(), lab_directory)
    await lab.taker().take(nothing)
    lab.cluster.wait_until_archived(lab.cluster.switch_wal())
    restored = lab_directory / "restored"
    settings = {
        "WALG_FILE_PREFIX": str(lab.store.root),
        "PGDATA": str(restored),
        "TARGET_IMMEDIATE": "true",
        "PITR_HOOK_DIR": str(hook_directory),
        "PITR_SOCKET": str(lab_directory / "agent.sock"),
    }
    for path in lab.store.root.rglob("*"):
        hand_over(path)
    done = await asyncio.to_thread(pitr, "restore", settings=settings)
    assert done.returncode == 0, done.stderr
    added = ("pitr.recovery.conf", MARKER_NAME, "global/pg_control")
    said = verified(verify_backup, restored, *(f"--ignore={name}" for name in added))
    assert "backup successfully verified" in said


async def test_a_backup_without_a_manifest_is_hydrated_without_one(
    make_cluster: MakeCluster, lab_directory: Path
) -> None:
    lab = start_lab(make_cluster(), lab_directory)
    backup = await lab.taker().take(nothing)
    await lab.store.delete([manifest_key(backup.name)])
    await hydrated(lab, backup.name, lab_directory / "restored", {})
    assert not (lab_directory / "restored" / "backup_manifest").exists()
