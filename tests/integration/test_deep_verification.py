"""`pitr verify --deep` on base backups of our own: each kind of object damaged, cut and lost, and told by its name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.domain.catalog import Backup
from agent.domain.delta_parent import DeltaPolicy
from agent.repository.cipher import Encryptor
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.storage.clock import SystemClock
from agent.storage.directory import DirectoryObjectStore
from agent.verify.content import Reading
from agent.verify.verifier import Verification, verify_content, verify_repository
from tests.support.agent_process import RunPitr
from tests.support.base_backup import BackupLab, start_lab
from tests.support.object_formats import KEY, OTHER_KEY, ZSTD, unpack
from tests.support.postgres import MakeCluster


async def verify(bucket: Path, objects: ObjectFormat = ZSTD, name: str | None = None) -> Verification:
    store = DirectoryObjectStore(bucket)
    archive = WalArchive(store, objects)
    found = await verify_repository(store, archive, SystemClock())
    return await verify_content(Reading(store, objects, archive, 2), found, lambda _: None, name=name)


def told(found: Verification) -> str:
    """Return all that is wrong, as text."""
    return "\n".join(found.problems)


@dataclass
class Taken:
    """A full base backup, a delta on it, and the WAL of a stopped server."""

    lab: BackupLab
    full: Backup
    delta: Backup

    def copy(self, directory: Path) -> Path:
        """Copy the repository."""
        return Path(shutil.copytree(self.lab.store.root, directory / "copy"))


async def take(make_cluster: MakeCluster, directory: Path, objects: ObjectFormat = ZSTD) -> Taken:
    cluster = make_cluster(17)
    for path in (cluster.data_directory, *cluster.data_directory.rglob("*")):
        os.utime(path, (1e9, 1e9))
    lab = start_lab(cluster, directory)
    cluster.execute("CREATE TABLE facts AS SELECT i, repeat('x', 300) AS filler FROM generate_series(1, 4000) i")
    taker = lab.taker(deltas=DeltaPolicy(max_steps=5), objects=objects)
    full = await taker.take(lambda _: None)
    cluster.execute(
        "UPDATE facts SET filler = 'new' WHERE i = 7",
        "CREATE TABLE more AS TABLE facts",
        "INSERT INTO more TABLE facts",
    )
    delta = await taker.take(lambda _: None)
    cluster.wait_until_archived(cluster.switch_wal())
    cluster.stop()
    return Taken(lab, full, delta)


def flip(path: Path, at: float) -> None:
    """Flip all bits of 16 bytes, `at` a share of the file's length: a codec may make the same of one bit's change."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * at)
    content[start : start + 16] = bytes(byte ^ 0xFF for byte in content[start : start + 16])
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


async def test_damage_to_any_object_is_told_by_name_and_hides_no_other(
    make_cluster: MakeCluster, lab_directory: Path
) -> None:
    taken = await take(make_cluster, lab_directory)
    assert (await verify(taken.lab.store.root)).problems == []
    folder = Path("basebackups_005") / taken.full.name
    wal = sorted(path.name for path in (taken.lab.store.root / "wal_005").iterdir() if len(path.name) == 24)
    between = wal[wal.index(taken.full.start_segment) + 1]  # full of WAL, and needed by no base backup itself
    objects = [
        folder / "tar_partitions" / "part_001.tar.zst",
        folder / "tar_partitions" / "pg_control.tar.zst",
        folder / "tar_partitions" / "backup_label.tar.zst",
        folder / "backup_manifest.zst",
        Path("basebackups_005") / taken.delta.name / "tar_partitions" / "part_001.tar.zst",
        Path("wal_005") / between,
    ]
    damages: list[Callable[[Path], None]] = [lambda path: flip(path, 0.5), lambda path: flip(path, 0.95), cut]
    for number, damage in enumerate(damages):
        bucket = taken.copy(lab_directory / str(number))
        for key in objects:
            damage(bucket / key)
        found = await verify(bucket)
        for key in objects:
            assert str(key) in told(found), (number, key)
        assert found.read is not None
        assert found.read.objects > len(objects), "the others were read all the same"
    bucket = taken.copy(lab_directory / "lost")
    for key in objects:
        (bucket / key).unlink()
    text = told(await verify(bucket))
    assert f"{taken.full.name}: part_001.tar.zst is missing" in text
    assert "pg_control.tar is missing" in text
    assert "backup_label.tar.zst is missing" in text
    assert f"{taken.delta.name}: it builds on {taken.full.name}, which is broken" in text
    assert f"1 WAL segments from {between} on are missing" in text
    bucket = taken.copy(lab_directory / "undescribed")
    for name in ("metadata.json", "files_metadata.json", "backup_manifest.zst"):
        (bucket / folder / name).unlink()
        assert f"{taken.full.name}: {name} is missing" in told(await verify(bucket))


async def test_documents_that_do_not_fit_the_files_are_told(make_cluster: MakeCluster, lab_directory: Path) -> None:
    taken = await take(make_cluster, lab_directory)
    files = Path("basebackups_005") / taken.full.name / "files_metadata.json"
    sentinel = Path("basebackups_005") / f"{taken.delta.name}_backup_stop_sentinel.json"

    bucket = taken.copy(lab_directory / "renamed")
    (bucket / files).write_text((bucket / files).read_text().replace('"/PG_VERSION":', '"/PG_VERSIOM":'))
    found = await verify(bucket, name=taken.full.name)
    assert "holds PG_VERSION, which is not listed" in told(found)
    assert "lack 1 of the files it lists, as PG_VERSIOM" in told(found)
    assert [each.name for each in found.backups] == [taken.full.name], "only this one was asked about"

    bucket = taken.copy(lab_directory / "damaged")
    cut(bucket / files)
    flip(bucket / sentinel, 0.0)
    problems = {each.name: each.problems for each in (await verify(bucket)).backups}
    assert str(files) in problems[taken.full.name][0]
    assert str(sentinel) in problems[taken.delta.name][0]


async def test_a_file_that_is_not_what_was_read_is_told(make_cluster: MakeCluster, lab_directory: Path) -> None:
    taken = await take(make_cluster, lab_directory)
    store, files = taken.lab.store, f"basebackups_005/{taken.full.name}/files_metadata.json"
    path = "base/5/1259"
    sets = json.loads((store.root / files).read_bytes())["TarFileSets"]
    tar = next(name for name, members in sets.items() if f"/{path}" in members)
    key = f"basebackups_005/{taken.full.name}/tar_partitions/{tar}"
    plain = bytearray(unpack(ZSTD, key, (store.root / key).read_bytes()))
    plain[plain.index(f"{path}\0".encode()) + 512 + 8192 + 5000] ^= 1  # in its second page; the stream is whole
    (store.root / key).write_bytes(ZSTD.encode(plain))
    found = told(await verify(store.root))
    assert f"{path} in {key} has the CRC32C" in found
    assert f"{path} in {key} has a page with a wrong checksum, block 1" in found


async def test_another_key_is_told_as_such_and_one_damaged_object_is_not(
    make_cluster: MakeCluster, lab_directory: Path, pitr: RunPitr
) -> None:
    taken = await take(make_cluster, lab_directory)
    bucket = lab_directory / "encrypted"
    for path in taken.lab.store.root.rglob("*"):
        target = bucket / path.relative_to(taken.lab.store.root)
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.suffix == ".json":
            shutil.copyfile(path, target)
        else:
            encryptor = Encryptor(KEY.reveal())
            target.write_bytes(encryptor.encrypt(path.read_bytes()) + encryptor.flush())
    settings = {"WALG_FILE_PREFIX": str(bucket), "WALG_LIBSODIUM_KEY_TRANSFORM": "hex"}
    right = settings | {"WALG_LIBSODIUM_KEY": KEY.reveal().hex()}
    whole = pitr("verify", "--deep", "--json", settings=right)
    assert (whole.returncode, json.loads(whole.stdout)["ok"]) == (0, True), whole.stderr
    assert (
        pitr("verify", "--deep", settings=settings | {"WALG_LIBSODIUM_KEY": OTHER_KEY.reveal().hex()}).returncode == 23
    )
    part = bucket / "basebackups_005" / taken.full.name / "tar_partitions" / "part_001.tar.zst"
    flip(part, 0.0)
    broken = pitr("verify", "--deep", "--json", settings=right)
    assert broken.returncode == 22
    answer = json.loads(broken.stdout)
    assert [each["ok"] for each in answer["backups"]] == [False, False]
    assert part.name in answer["backups"][0]["problems"][0]
    assert answer["read"]["objects"] > 0
