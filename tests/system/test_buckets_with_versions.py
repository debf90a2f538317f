"""Buckets that keep what is deleted: versioned, and with an object lock, on a real S3 server."""

import json
import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.seaweedfs import SeaweedServer
from agent.repository.keys import WAL_FOLDER, sentinel_key
from agent.repository.wal_metadata import SYSTEM_IDENTIFIER
from tests.support.stack import MakeStack, Stack
from tests.support.until import next_second

ROWS = "SELECT array_agg(i ORDER BY i) FROM t"
LOCK = {"Mode": "COMPLIANCE", "Days": 1}


class KeepingBucket:
    """A bucket that keeps versions; with `locked` nobody can remove one for a day."""

    def __init__(self, server: SeaweedServer, *, locked: bool) -> None:
        self.name = f"versions-{uuid.uuid4().hex[:8]}"
        self.client: Any = boto3.client(  # boto3 makes its clients' classes at run time
            "s3", endpoint_url=server.endpoint, region_name="us-east-1", aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
        )  # fmt: skip
        self.client.create_bucket(Bucket=self.name, ObjectLockEnabledForBucket=locked)
        if locked:
            rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": LOCK}}
            self.client.put_object_lock_configuration(Bucket=self.name, ObjectLockConfiguration=rule)
        else:
            self.client.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"})

    def last(self, prefix: str) -> str:
        """Return the last key of those that are there."""
        return str(self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)["Contents"][-1]["Key"])

    def leave_of_an_earlier_life(self, key: str) -> None:
        """Store and delete what another database cluster may have archived before the prefix was emptied."""
        self.client.put_object(Bucket=self.name, Key=key, Body=b"x", Metadata={SYSTEM_IDENTIFIER: "7123"})
        self.client.delete_object(Bucket=self.name, Key=key)

    def hidden(self, key: str) -> tuple[str, str]:
        """Return the one version of an object that was deleted, and its delete marker."""
        told = self.client.list_object_versions(Bucket=self.name, Prefix=key)
        (version,), (marker,) = told["Versions"], told["DeleteMarkers"]
        return version["VersionId"], marker["VersionId"]


def segment_after(key: str) -> str:
    """Return the key of the WAL segment after that of `key`, in the same codec."""
    name, dot, extension = key.rpartition("/")[2].partition(".")
    return f"{key.rpartition('/')[0]}/{name[:16]}{int(name[16:], 16) + 1:08X}{dot}{extension}"


def pitr(stack: Stack, *arguments: str) -> Any:
    done = run_pitr(*arguments, "--json", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def add_row(stack: Stack, row: int) -> None:
    stack.cluster.execute(f"INSERT INTO t VALUES ({row})")
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())


def restore(stack: Stack, directory: Path, code: int) -> str:
    """Restore to the end of the WAL, with a hook that gives up soon; return what was said."""
    hooks = directory.with_name("hooks")
    hooks.mkdir(exist_ok=True)
    script = hooks / "wal-restore.sh"
    script.write_text(f'#!/bin/sh\nPITR_HOOK_TIMEOUT=2 exec {stack.hooks}/wal-restore.sh "$@"\n')
    script.chmod(0o755)
    hand_over(hooks)
    settings = {
        **stack.repository, "PGDATA": str(directory), "PITR_HOOK_DIR": str(hooks), "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries["postgres"].parent),
    }  # fmt: skip
    done = run_pitr("restore", settings=settings)
    assert done.returncode == code, done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("locked", [False, True], ids=["versioned", "locked"])
def test_what_expires_is_hidden_and_what_was_deleted_is_lost_not_absent(
    make_stack: MakeStack, s3_server: SeaweedServer, lab_directory: Path, *, locked: bool
) -> None:
    bucket = KeepingBucket(s3_server, locked=locked)
    stack = make_stack(repository=s3_server.environment(bucket.name, "db"), settings={"PITR_BACKUP_SCHEDULE": ""})
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    first = pitr(stack, "backup", "now")["backup"]
    add_row(stack, 2)
    next_second()
    second = pitr(stack, "backup", "now")["backup"]
    add_row(stack, 3)
    removed = pitr(stack, "expire", "--retention", "full=1", "--confirm")["removed"]
    assert (removed["failed"], removed["bucket_keeps_versions"], removed["wal_objects"] > 0) == ([], True, True)
    assert [each["name"] for each in pitr(stack, "backup", "list")] == [second]
    assert pitr(stack, "expire", "--retention", "full=1")["removes_bytes"] == 0
    version, _ = bucket.hidden(f"db/{sentinel_key(first)}")
    if locked:
        with pytest.raises(ClientError, match="AccessDenied"):
            bucket.client.delete_object(Bucket=bucket.name, Key=f"db/{sentinel_key(first)}", VersionId=version)

    stack.agent.stop()
    last = bucket.last(f"db/{WAL_FOLDER}0")
    bucket.client.delete_object(Bucket=bucket.name, Key=last)
    version, marker = bucket.hidden(last)
    told = restore(stack, lab_directory / "restored", code=51)
    assert f"was archived and is deleted; the bucket keeps {last.removeprefix('db/')}, version {version}" in told
    bucket.client.delete_object(Bucket=bucket.name, Key=last, VersionId=marker)
    bucket.leave_of_an_earlier_life(segment_after(last))
    restore(stack, lab_directory / "restored", code=0)
    with PostgresCluster(lab_directory / "restored", stack.cluster.binaries) as restored:
        restored.start()
        assert restored.value(ROWS) == [1, 2, 3]
