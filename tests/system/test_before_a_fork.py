"""A restore to before the moment that an earlier restore went back to, of a transaction that is still in doubt."""

import shutil
import subprocess
from pathlib import Path

import pytest

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_directory
from tests.support.agent_process import MakeAgent
from tests.support.stack import MakeStack, Stack


def committed(cluster: PostgresCluster, row: int) -> str:
    """Insert a row; return the transaction's id."""
    with cluster.connect() as session, session.transaction():
        session.execute(f"INSERT INTO t VALUES ({row})")
        return str((session.execute("SELECT txid_current()").fetchone() or ("",))[0])


def restore(stack: Stack, directory: Path, **settings: str) -> "subprocess.CompletedProcess[str]":
    binaries = str(stack.cluster.binaries.directory)
    where = {"PGDATA": str(directory), "PITR_HOOK_DIR": str(stack.hooks), "PITR_POSTGRES_BIN": binaries}
    return run_pitr("restore", settings={**stack.repository, **where, "AUTO_START": "true", **settings})


def require_in_doubt(stack: Stack, directory: Path) -> None:
    """Compare the rows before and after the prepared transaction is committed."""
    with PostgresCluster(directory, stack.cluster.binaries) as cluster:
        cluster.start()
        assert cluster.value("SELECT array_agg(i) FROM t") == [1]
        cluster.execute("COMMIT PREPARED 'in doubt'")
        assert cluster.value("SELECT array_agg(i ORDER BY i) FROM t") == [0, 1]


@pytest.mark.parametrize("major", [13, 18])
def test_a_transaction_is_in_doubt_again_before_the_fork_of_the_timeline_that_is_followed(
    major: int, make_stack: MakeStack, make_agent: MakeAgent, lab_directory: Path
) -> None:
    bucket = lab_directory / "bucket"
    make_directory(bucket)
    hand_over(bucket)
    stack = make_stack(repository={"WALG_FILE_PREFIX": str(bucket)}, major=major)
    stack.cluster.configure(max_prepared_transactions=5)
    stack.cluster.restart()
    stack.cluster.execute("CREATE TABLE t (i int)")
    done = run_pitr("backup", "now", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    with stack.cluster.connect() as session:
        for statement in ("BEGIN", "INSERT INTO t VALUES (0)", "PREPARE TRANSACTION 'in doubt'"):
            session.execute(statement)
    earlier = committed(stack.cluster, 1)
    between = stack.cluster.value("SELECT pg_current_wal_insert_lsn()")
    later = committed(stack.cluster, 2)
    earlier_copy = stack.cluster.value("SELECT pg_walfile_name(pg_current_wal_lsn())")
    stack.cluster.stop()

    second = lab_directory / "second"
    done = restore(stack, second, TARGET_XID=later, TARGET_INCLUSIVE="false", PITR_ARCHIVE_AFTER_RESTORE="true")
    assert done.returncode == 0, done.stderr
    with PostgresCluster(second, stack.cluster.binaries) as successor:
        agent = make_agent({**stack.repository, **successor.client_environment}, name="second-agent")
        successor.environment["PITR_SOCKET"] = str(agent.socket)
        agent.start()
        successor.start()
        successor.wait_until_archived(successor.switch_wal())
    done = restore(stack, lab_directory / "third", TARGET_XID=earlier)
    assert done.returncode == 0, done.stderr
    assert "replay ends before timeline 2 left timeline 1" in done.stdout + done.stderr
    require_in_doubt(stack, lab_directory / "third")

    done = restore(stack, lab_directory / "by-lsn", TARGET_LSN=between)
    assert done.returncode == 0, done.stderr
    require_in_doubt(stack, lab_directory / "by-lsn")

    fork = (second / "pg_wal" / "00000002.history").read_text().split()[1]
    right_before = {"TARGET_LSN": fork, "TARGET_INCLUSIVE": "false"}
    done = restore(stack, lab_directory / "right-before", **right_before)
    assert done.returncode == 0, done.stderr
    require_in_doubt(stack, lab_directory / "right-before")

    (archived,) = (bucket / "wal_005").glob(f"{earlier_copy}.*")
    archived.unlink()  # as after a failover: the first server never came to archive it
    fourth = lab_directory / "fourth"
    done = restore(stack, fourth, TARGET_XID=earlier)
    assert done.returncode == 51
    assert f"requested WAL segment pg_wal/{earlier_copy}" in done.stderr
    assert "only a later timeline's copy is archived: copy that one" in done.stderr
    shutil.copy(fourth / "pg_wal" / f"00000002{earlier_copy[8:]}", fourth / "pg_wal" / earlier_copy)
    hand_over(fourth / "pg_wal")
    done = restore(stack, fourth, TARGET_XID=earlier)
    assert done.returncode == 0, done.stderr
    require_in_doubt(stack, fourth)
