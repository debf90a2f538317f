"""What keeps a restore from being carried out here is told at once, all of it, and nothing is touched."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.domain.restore_plan import RestorePlan
from agent.errors import ConfigError, PreflightFailed
from agent.repository.wal_archive import WalArchive
from agent.restore.marker import MarkerStage, RestoreMarker, write_marker
from agent.restore.planner import plan_from_repository
from agent.restore.preflight import preflight, require_possible
from agent.settings import Settings, load_settings
from agent.storage.directory import DirectoryObjectStore
from tests.support.walg_buckets import BUCKETS, WalgBucket, needs_walg_buckets

pytestmark = needs_walg_buckets

BUCKET = WalgBucket("pg16-tablespaces")
STORE = DirectoryObjectStore(BUCKETS / BUCKET.name / "bucket")


def settings_for(directory: Path, **more: str) -> Settings:
    moved = ",".join(f"{item['location']}={directory}/{item['name']}" for item in BUCKET.expected["tablespaces"])
    here = {"PGDATA": str(directory / "pgdata"), "PITR_TABLESPACE_MAP": moved}
    return load_settings({**BUCKET.settings, **here, **more})


async def a_plan(settings: Settings) -> RestorePlan:
    return await plan_from_repository(STORE, WalArchive(STORE, BUCKET.objects), settings.target)


async def problems(settings: Settings, plan: RestorePlan | None = None) -> list[str]:
    found = await preflight(STORE, settings, plan or await a_plan(settings))
    assert all(problem.hint for problem in found), "each has a next step"
    return [problem.message for problem in found]


async def test_an_empty_directory_with_room_is_fit(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    await require_possible(STORE, settings, await a_plan(settings))
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a Path's own method would be taken for blocking a loop


async def test_all_problems_are_told_at_once_with_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "pgdata").mkdir()
    (tmp_path / "pgdata" / "precious").touch()
    first = BUCKET.expected["tablespaces"][0]["name"]
    (tmp_path / first).mkdir()
    (tmp_path / first / "theirs").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = settings_for(tmp_path, AUTO_START="true", PITR_POSTGRES_BIN=str(empty), PITR_HOOK_DIR=str(empty))
    with pytest.raises(PreflightFailed) as refused:
        await require_possible(STORE, settings, await a_plan(settings))
    told = refused.value.lines()
    expected = ("precious", "PostgreSQL 16", "wal-restore.sh", "theirs")
    assert [word in line for word, line in zip(expected, told, strict=True)] == [True] * 4
    assert refused.value.exit_code == ConfigError.exit_code


async def test_a_volume_without_room_is_told_with_the_bytes(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    plan = await a_plan(settings)
    assert plan.disk_bytes > plan.chain[-1].size_bytes, "a delta restores to more than it holds"
    huge = replace(plan, backup=replace(plan.backup, catalog_bytes=1 << 60))
    (told,) = await problems(settings, huge)
    assert "MiB free" in told
    assert plan.backup.name in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_tablespace_that_cannot_go_back_is_told(tmp_path: Path) -> None:
    settings = load_settings({**BUCKET.settings, "PGDATA": str(tmp_path / "pgdata")})
    told = await problems(settings)
    assert len(told) == len(BUCKET.expected["tablespaces"])


async def test_a_tablespace_map_that_fits_no_tablespace_is_told(tmp_path: Path) -> None:
    settings = load_settings({
        **BUCKET.settings, "PGDATA": str(tmp_path / "pgdata"), "PITR_TABLESPACE_MAP": "/no/such=/elsewhere",
    })  # fmt: skip
    (told,) = await problems(settings)
    assert "/no/such" in told


@pytest.mark.parametrize("who", ["another", "unknown", "same"])
async def test_what_another_restore_has_begun_to_fill_is_taken_only_for_the_same_cluster(
    tmp_path: Path, who: str
) -> None:
    path = tmp_path / "pgdata"
    path.mkdir()
    (path / "precious").touch()
    over = settings_for(tmp_path, PITR_RESTORE_DELTA="true")
    plan = await a_plan(over)
    held = {"another": 7, "unknown": None, "same": plan.backup.system_identifier}[who]
    marker = RestoreMarker(
        request={"repository": "another"},
        stage=MarkerStage.HYDRATING,
        backup="base_000000010000000000000002",
        timeline=1,
        target="the end of the archived WAL",
        first_segment="000000010000000000000002",
        last_segment="000000010000000000000002",
        to_the_end=True,
        started_at=datetime.now(UTC),
        system_identifier=held,
    )
    write_marker(path, marker)
    told = await problems(over, plan)
    if who == "same":
        assert told == []
    else:
        assert len(told) == 1
        assert f"is of the database cluster {held or 'that a restore was begun of'}" in told[0]
    assert "holds another restore (hydrating)" in (await problems(settings_for(tmp_path), plan))[0]
