"""What `pitr verify` finds: whatever is taken from a repository that WAL-G or retention left whole."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis.strategies import DataObject, data, sampled_from

from agent.domain.retention import RetentionPolicy, decide, needed_wal
from agent.domain.verification import missing_wal
from agent.errors import RepositoryCorrupt
from agent.repository.wal_archive import WalArchive
from agent.storage.clock import SystemClock
from agent.storage.directory import DirectoryObjectStore
from agent.verify.verifier import Verification, verify_repository
from tests.support.retention_world import Past, pasts, policies
from tests.support.walg_buckets import BUCKETS, WalgBucket, needs_walg_buckets

REPOSITORIES = sorted(path.parent.name for path in BUCKETS.glob("*/expected.json"))


@settings(max_examples=200, deadline=None)
@given(pasts(gaps=False), policies(), data())
def test_gaps_are_told_and_what_expiry_left_is_none(past: Past, policy: RetentionPolicy, data: DataObject) -> None:
    assume(past.cluster == 1)
    verdicts = [verdict for verdict in decide(past.inventory(), policy) if verdict.stays]
    needed = needed_wal(past.inventory(), verdicts)
    past.backups = [verdict.backup for verdict in verdicts]
    past.stored_at = {(t, n): at for (t, n), at in past.stored_at.items() if needed.keeps(t, n, at)}
    assert missing_wal(past.inventory()) == []
    # Somebody loses a segment in the middle of what a base backup needs.
    middles = [
        segment
        for backup in past.backups
        for segment in past.segments(backup, backup.timeline, backup.finish_lsn)
        if segment in past.stored_at
    ]
    assume(middles)
    lost = data.draw(sampled_from(middles))
    del past.stored_at[lost]
    told = missing_wal(past.inventory())
    assert any(int(gap.first[16:], 16) <= lost[1] <= int(gap.last[16:], 16) for gap in told) or not past.stored_at


async def verify(bucket: Path, name: str) -> Verification:
    store = DirectoryObjectStore(bucket)
    return await verify_repository(store, WalArchive(store, WalgBucket(name).objects), SystemClock())


@needs_walg_buckets
@pytest.mark.parametrize("name", REPOSITORIES)
async def test_repositories_of_wal_g_are_whole(name: str) -> None:
    found = await verify(BUCKETS / name / "bucket", name)
    assert found.is_ok
    assert {each.name for each in found.backups} == {each["name"] for each in WalgBucket(name).expected["backups"]}
    found.raise_if_broken()


@needs_walg_buckets
async def test_what_is_missing_or_cut_is_told_by_its_name(tmp_path: Path) -> None:
    name = "pg17-zstd-delta"
    shutil.copytree(BUCKETS / name / "bucket", tmp_path / "bucket", copy_function=shutil.copyfile)
    full, delta, last = (each["name"] for each in WalgBucket(name).expected["backups"])
    backups, wal = tmp_path / "bucket" / "basebackups_005", tmp_path / "bucket" / "wal_005"
    part = backups / delta / "tar_partitions" / "part_001.tar.zst"
    part.write_bytes(part.read_bytes()[:-1])
    (backups / last / "tar_partitions" / "pg_control.tar.zst").unlink()
    segments = sorted(path for path in wal.iterdir() if len(path.stem) == 24)
    lost = segments[-3]
    lost.unlink()
    found = await verify(tmp_path / "bucket", name)
    problems = {each.name: each.problems for each in found.backups}
    assert problems[full] == []
    assert "bytes" in problems[delta][0]
    assert "pg_control.tar is missing" in problems[last]
    assert any(f"builds on {delta}" in problem for problem in problems[last])
    assert [(gap.first, gap.segments) for gap in found.gaps] == [(lost.stem, 1)]
    with pytest.raises(RepositoryCorrupt, match=f"{delta}.*more problems"):
        found.raise_if_broken()
    assert replace(found, backups=[], gaps=[]).is_ok
