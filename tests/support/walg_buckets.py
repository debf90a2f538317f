"""Repositories written by WAL-G, with states that a restore must give, and targets that it must refuse."""

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import PostgresBinaries
from agent.lab.privileges import hand_over
from agent.repository.object_format import ObjectFormat
from agent.settings import Compression, load_settings

BUCKETS = Path(__file__).parents[2].parent / "shared" / "walg-buckets"

needs_walg_buckets = pytest.mark.skipif(not BUCKETS.is_dir(), reason=f"the repositories are not in {BUCKETS}")


@dataclass(frozen=True)
class WalgBucket:
    """One repository; what it holds is in its `expected.json`."""

    name: str

    @cached_property
    def expected(self) -> dict[str, Any]:
        """The content of `expected.json`."""
        content: dict[str, Any] = json.loads((BUCKETS / self.name / "expected.json").read_text())
        return content

    @property
    def major(self) -> int:
        """PostgreSQL's major version that wrote it."""
        return int(self.expected["postgres"]["major"])

    @property
    def objects(self) -> ObjectFormat:
        """How its objects are packed, with the key that they are encrypted with."""
        return ObjectFormat(
            Compression(self.expected["compression"]["method"]), load_settings(self.settings).libsodium_key
        )

    @property
    def settings(self) -> dict[str, str]:
        """The settings that name it where it was written, and its key."""
        return {"WALG_FILE_PREFIX": str(BUCKETS / self.name / "bucket"), **_encryption_key(self)}

    def copy_to(self, directory: Path) -> Path:
        """Copy the objects with the times they were stored at, which a checkout does not keep; return `directory`."""
        for item in self.expected["objects"]:
            path = directory / item["key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUCKETS / self.name / "bucket" / item["key"], path)  # without its mode: it may be read-only
            os.utime(path, ns=(item["modified_ns"], item["modified_ns"]))
        hand_over(directory)
        return directory


@dataclass(frozen=True)
class RecoveryPoint:
    """One way to ask for one state: a checkpoint of `expected.json` by one of its targets, from one base backup.

    backup: the base backup that is named, None: the plan is to choose.
    """

    bucket: WalgBucket
    checkpoint: str
    target: str
    value: str
    backup: str | None = None

    def __str__(self) -> str:
        named = "" if self.backup is None else f"-from-{self.backup[21:29]}"
        return f"{self.bucket.name}-{self.checkpoint}-by-{self.target.lower() or 'no target'}{named}"

    @property
    def expected(self) -> dict[str, Any]:
        """The checkpoint."""
        points: list[dict[str, Any]] = self.bucket.expected["checkpoints"]
        return next(point for point in points if point["id"] == self.checkpoint)

    @property
    def answers(self) -> list[str]:
        """What the checks of the checkpoint give."""
        return [check["result"] for check in self.expected["checks"]]

    @property
    def settings(self) -> dict[str, str]:
        """The settings that ask for it."""
        return {
            "TARGET_TIMELINE": str(self.expected["timeline"]),
            "TARGET_INCLUSIVE": str(self.expected["inclusive"]).lower(),
            **({self.target: self.value} if self.target else {}),
            **({"BACKUP_NAME": self.backup} if self.backup else {}),
        }


def recovery_points(name: str, *, reachable: bool, every_target: bool = True) -> list[RecoveryPoint]:
    """Return the points of the repository `name`; none if it is not there.

    With the backup that the plan is to choose each comes by every target that leads to it, or by one in turn; from
    every other backup that serves it by one in turn.
    """
    if not BUCKETS.is_dir():
        return []
    bucket = WalgBucket(name)
    points = [point for point in bucket.expected["checkpoints"] if point["reachable"] is reachable]
    return [point for index, content in enumerate(points) for point in _ways(bucket, content, index, every_target)]


def _ways(bucket: WalgBucket, content: dict[str, Any], index: int, every_target: bool) -> list[RecoveryPoint]:
    if content.get("immediate"):  # of the newest backup unless one is named
        return [RecoveryPoint(bucket, content["id"], "TARGET_IMMEDIATE", "true", content["nearest_backup"])]
    kinds = ("target_time", "target_lsn", "target_xid", "target_name")
    targets = [(kind.upper(), str(content[kind])) for kind in kinds if kind in content]
    targets = [("", "")] if content.get("end_of_wal") else targets
    others = [backup for backup in content.get("restorable_from", []) if backup != content["nearest_backup"]]
    by_plan = targets if every_target else [targets[index % len(targets)]]
    return [
        *(RecoveryPoint(bucket, content["id"], *target) for target in by_plan),
        *(
            RecoveryPoint(bucket, content["id"], *targets[(index + turn) % len(targets)], backup=backup)
            for turn, backup in enumerate(others, 1)
        ),
    ]


def restore_settings(
    point: RecoveryPoint, directory: Path, hook_directory: Path, binaries: PostgresBinaries
) -> dict[str, str]:
    """Return the settings that restore `point` into `directory`/restored and run it through promotion.

    Its repository is copied to `directory`/bucket.
    """
    return {
        "WALG_FILE_PREFIX": str(point.bucket.copy_to(directory / "bucket")),
        "PGDATA": str(directory / "restored"),
        "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(binaries.directory),
        "PITR_HOOK_DIR": str(hook_directory),
        "PITR_SOCKET": str(directory / "agent.sock"),
        "TMPDIR": str(directory),  # a killed restore leaves its private directory
        **_tablespace_map(point.bucket, directory),
        **_encryption_key(point.bucket),
        **point.settings,
    }


def _tablespace_map(bucket: WalgBucket, directory: Path) -> dict[str, str]:
    """Return the setting that moves the repository's tablespaces below `directory`."""
    moved = [f"{item['location']}={directory}/{item['name']}" for item in bucket.expected["tablespaces"]]
    return {"PITR_TABLESPACE_MAP": ",".join(moved)} if moved else {}


def _encryption_key(bucket: WalgBucket) -> dict[str, str]:
    """Return the settings that name the key which the repository is encrypted with."""
    encryption = bucket.expected["encryption"]
    if encryption is None:
        return {}
    return {"WALG_LIBSODIUM_KEY": encryption["key"], "WALG_LIBSODIUM_KEY_TRANSFORM": encryption["transform"]}


def answers(cluster: PostgresCluster, point: RecoveryPoint) -> list[str]:
    """Return what the checks of `point` give on a running server, as text."""
    return [_answer(cluster, check["database"], check["query"]) for check in point.expected["checks"]]


def _answer(cluster: PostgresCluster, database: str, query: str) -> str:
    with cluster.connect(dbname=database) as session:
        result = session.execute(query.encode()).pgresult
    assert result is not None
    value = result.get_value(0, 0)
    assert value is not None
    return value.decode()
