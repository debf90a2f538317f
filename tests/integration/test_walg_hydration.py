"""Base backups written by WAL-G give exactly the files that they list, each as long as it was."""

import io
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.repository.wal_archive import WalArchive
from agent.restore.hydrate import claim, finish, hydrate
from agent.restore.planner import plan_from_repository
from agent.restore.wanted import is_stale
from agent.storage.directory import DirectoryObjectStore
from agent.telemetry.progress import Progress
from tests.integration.test_walg_plans import REPOSITORIES
from tests.support.object_formats import unpack
from tests.support.walg_buckets import BUCKETS, WalgBucket, needs_walg_buckets

pytestmark = needs_walg_buckets


@dataclass(frozen=True)
class WalgBackup:
    """One base backup of a repository, read without the code under test but for its codecs and cipher."""

    bucket: WalgBucket
    name: str

    def __str__(self) -> str:
        return f"{self.bucket.name}-{self.name[21:29]}"

    @property
    def described(self) -> dict[str, Any]:
        """What `expected.json` says of it."""
        return next(item for item in self.bucket.expected["backups"] if item["name"] == self.name)

    @property
    def folder(self) -> Path:
        """Where its objects are."""
        return BUCKETS / self.bucket.name / "bucket" / "basebackups_005" / self.name

    def files(self) -> dict[str, Any]:
        """Return `Files` of files_metadata.json."""
        files: dict[str, Any] = json.loads((self.folder / "files_metadata.json").read_text())["Files"]
        return files

    def members(self) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Yield what is in its tars."""
        for path in sorted((self.folder / "tar_partitions").iterdir()):
            plain = unpack(self.bucket.objects, path.name, path.read_bytes())
            with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
                for info in tar:
                    content = tar.extractfile(info)
                    yield info, content.read() if content is not None else b""

    def sizes(self) -> dict[str, int]:
        """Return how long each file must be in the end: whole here, as its increment here says, or as in the parent."""
        parent = self.described["parent"]
        inherited = {} if parent is None else WalgBackup(self.bucket, parent).sizes()
        files = self.files()
        sizes = {name: inherited[name] for name, what in files.items() if what["IsSkipped"] and name in inherited}
        for info, content in self.members():
            if info.isreg() and info.name in files:
                is_increment = files[info.name]["IsIncremented"]
                sizes[info.name] = struct.unpack_from("<Q", content, 4)[0] if is_increment else len(content)
        return sizes


BACKUPS = [
    WalgBackup(WalgBucket(name), backup["name"])
    for name in (REPOSITORIES if BUCKETS.is_dir() else [])
    for backup in WalgBucket(name).expected["backups"]
]


@pytest.mark.parametrize("backup", BACKUPS, ids=str)
async def test_a_base_backup_gives_exactly_the_files_it_lists(backup: WalgBackup, tmp_path: Path) -> None:
    store = DirectoryObjectStore(backup.bucket.copy_to(tmp_path / "bucket"))
    archive = WalArchive(store, backup.bucket.objects)
    timeline = str(backup.described["timeline"])
    plan = await plan_from_repository(
        store, archive, RestoreTarget(TargetKind.IMMEDIATE, timeline=timeline), backup.name
    )
    assert len(plan.chain) == 1 + (backup.described["delta_count"] or 0)
    directory, reported = tmp_path / "data", list[Progress]()
    tablespaces = {item["location"]: str(tmp_path / str(item["oid"])) for item in backup.described["tablespaces"]}
    await claim(directory)
    await hydrate(
        store, backup.bucket.objects, plan, directory, tablespace_map=tablespaces, concurrency=4, report=reported.append
    )
    await finish(directory)
    found = {f"/{path.relative_to(directory)}": path for path in all_below(directory)}
    listed = {name for name in backup.files() if name != "/" and not is_stale(name.lstrip("/"))}
    links = {f"/pg_tblspc/{item['oid']}" for item in backup.described["tablespaces"]}
    made = {
        "/global/pg_control",
        "/backup_label",
        "/pg_wal/archive_status",
        *links,
        *(["/tablespace_map"] if links else []),
    }
    assert found.keys() == listed | made
    sizes = {name: path.stat().st_size for name, path in found.items() if path.is_file() and name in listed}
    assert sizes == {name: size for name, size in backup.sizes().items() if name in listed}
    assert reported[-1].ratio == 1.0


def all_below(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        yield path
        if path.is_dir():
            yield from all_below(path)
