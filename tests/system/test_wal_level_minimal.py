"""WAL of `wal_level=minimal` in between cuts the way to what follows, until the next base backup."""

import subprocess
from pathlib import Path

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from tests.support.stack import MakeStack, Stack


def restore(stack: Stack, directory: Path) -> "subprocess.CompletedProcess[str]":
    binaries = str(stack.cluster.binaries.directory)
    where = {"PGDATA": str(directory), "PITR_HOOK_DIR": str(stack.hooks), "PITR_POSTGRES_BIN": binaries}
    return run_pitr("restore", settings={**stack.repository, **where, "AUTO_START": "true"})


def test_a_restore_over_wal_of_the_level_minimal_says_so_and_the_next_base_backup_mends_it(
    make_stack: MakeStack, s3_environment: dict[str, str], lab_directory: Path
) -> None:
    stack = make_stack(repository=s3_environment)
    cluster = stack.cluster
    cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    assert run_pitr("backup", "now", settings=stack.agent.settings).returncode == 0
    cluster.stop()
    cluster.start("-c", "wal_level=minimal", "-c", "archive_mode=off", "-c", "max_wal_senders=0")
    cluster.execute("INSERT INTO t VALUES (2)")
    checked = run_pitr("check", "--no-switch", settings=stack.agent.settings)
    assert checked.returncode == 10
    assert "minimal: WAL lacks what a recovery needs" in " ".join(checked.stdout.split())
    refused = run_pitr("backup", "now", settings=stack.agent.settings)
    assert refused.returncode == 50, refused.stderr
    cluster.stop()
    cluster.start()
    cluster.execute("INSERT INTO t VALUES (3)")
    cluster.wait_until_archived(cluster.switch_wal())

    done = restore(stack, lab_directory / "before")
    assert done.returncode == 51, done.stderr
    assert "WAL written under wal_level=minimal cannot be replayed: restore to a moment before it" in done.stderr
    assert run_pitr("backup", "now", "--full", settings=stack.agent.settings).returncode == 0
    done = restore(stack, lab_directory / "after")
    assert done.returncode == 0, done.stderr
    with PostgresCluster(lab_directory / "after", cluster.binaries) as restored:
        restored.start()
        assert restored.value("SELECT array_agg(i ORDER BY i) FROM t") == [1, 2, 3]
