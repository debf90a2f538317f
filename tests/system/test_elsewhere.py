"""What a restore on another machine lacks, or sorts otherwise, is said with the restore and by `pitr check`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from agent.lab.agent_process import AgentProcess, run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_directory
from agent.restore.collations import local_libc
from tests.support.stack import MakeStack


def sorted_otherwise(agent: AgentProcess, cluster: PostgresCluster) -> dict[str, str]:
    """Return what `pitr check` says of collations."""
    done = run_pitr("check", "--json", "--no-switch", settings={**agent.settings, **cluster.client_environment})
    findings: list[dict[str, str]] = json.loads(done.stdout)["checks"]
    return next((each for each in findings if each["check"] == "collations"), {})


def test_what_is_different_here_is_told(make_stack: MakeStack, lab_directory: Path) -> None:
    bucket, etc = lab_directory / "bucket", lab_directory / "etc"
    for directory in (bucket, etc):
        make_directory(directory)
        hand_over(directory)
    stack = make_stack(repository={"WALG_FILE_PREFIX": str(bucket)})
    cluster = stack.cluster
    # A name that no machine lacks stands for the collations of an operating system; its version is that of the library.
    cluster.execute("UPDATE pg_collation SET collcollate = 'xx_XX' WHERE collprovider = 'c' AND collname = 'POSIX'")
    cluster.stop()
    shutil.copy(cluster.data_directory / "pg_hba.conf", etc)
    hand_over(etc)
    cluster.start("-c", f"hba_file={etc / 'pg_hba.conf'}")
    done = run_pitr("backup", "now", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    (path,) = (bucket / "basebackups_005").glob("*_backup_stop_sentinel.json")
    sentinel: dict[str, Any] = json.loads(path.read_text())
    assert (sentinel["PitrLibc"], sentinel["PitrConfigOutside"]) == (local_libc(), [str(etc / "pg_hba.conf")])

    def restored(name: str) -> str:
        where = {"PGDATA": str(lab_directory / name), "PITR_HOOK_DIR": str(stack.hooks)}
        done = run_pitr("restore", "--json", settings={**stack.repository, **where})
        assert done.returncode == 0, done.stderr
        note: str = json.loads(done.stdout)["note"]
        return note

    assert restored("here") == f"not in the base backup: {etc / 'pg_hba.conf'}"
    path.write_text(json.dumps(sentinel | {"PitrLibc": "2.11"}))
    assert f"text was sorted by glibc 2.11, here is glibc {local_libc()}: indexes" in restored("elsewhere")


def test_databases_that_were_sorted_by_another_version_are_told_with_the_sql_that_mends_them(
    make_stack: MakeStack, s3_environment: dict[str, str]
) -> None:
    stack = make_stack(repository=s3_environment)
    locale = "LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"  # one that has a version on every machine
    stack.cluster.execute(f"CREATE DATABASE \"a b\" TEMPLATE template0 ENCODING 'UTF8' {locale}")
    assert sorted_otherwise(stack.agent, stack.cluster) == {}
    stack.cluster.execute("UPDATE pg_database SET datcollversion = '0' WHERE datname = 'a b'")
    found = sorted_otherwise(stack.agent, stack.cluster)
    assert (found["result"], found["text"].partition(" was")[0]) == ("warn", "text in a b")
    with stack.cluster.connect(dbname="a b") as session:
        for statement in re.findall("(?:REINDEX|ALTER)[^;]+;", found["fix"]):
            session.execute(statement)
    assert sorted_otherwise(stack.agent, stack.cluster) == {}
