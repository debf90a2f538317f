"""What only the store in a directory does: durable names, unfinished files, names that are no file names."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.errors import RepositoryRefused
from agent.ports import Body, ObjectStore
from agent.storage.directory import DirectoryObjectStore


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return DirectoryObjectStore(tmp_path)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../outside", "a/../../b", "a//b", "a/", "./a", "nul\0", ".pitr-tmp-x"]
)
async def test_a_name_that_leaves_the_directory_or_is_reserved_is_refused(store: ObjectStore, key: str) -> None:
    for call in (store.put(key, b"x"), store.put_if_absent(key, b"x"), store.get(key), store.delete([key])):
        with pytest.raises(RepositoryRefused, match="cannot be a file name"):
            await call


async def test_an_object_has_its_name_only_when_it_is_whole(store: ObjectStore, tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[Body]:
        yield b"first"
        assert [info.key async for info in store.list("")] == []
        (unfinished,) = (tmp_path / "folder").iterdir()
        assert unfinished.name.startswith(".pitr-tmp-")
        yield b"second"

    await store.put_stream("folder/key", chunks())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["key"]
    assert (tmp_path / "folder" / "key").read_bytes() == b"firstsecond"


async def test_a_folder_that_somebody_else_made_is_durable_before_what_is_in_it_is_stored(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    (tmp_path / "one" / "two").mkdir(parents=True)  # by a process that was killed before it could sync them
    await store.put_if_absent("one/two/key", b"x")
    assert {tmp_path, tmp_path / "one", tmp_path / "one" / "two"} <= set(synced)
    synced.clear()
    await store.put_if_absent("one/two/next", b"x")
    assert tmp_path not in synced


async def test_what_a_killed_agent_left_is_no_object(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / ".pitr-tmp-0123").write_bytes(b"half")
    await store.put("key", b"x")
    assert [info.key async for info in store.list("")] == ["key"]
    assert [info.key async for info in store.list_folder("")] == ["key"]


async def test_an_object_is_durable_before_its_name_is(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def recorded(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            steps.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        recorded(name)
    await store.put_if_absent("key", b"x")
    assert steps == ["fsync", "link", "fsync"]
    steps.clear()
    await store.put("folder/key", b"x")
    assert steps == ["fsync", "fsync", "replace", "fsync"]


async def test_an_object_cannot_lie_below_another_one(store: ObjectStore) -> None:
    await store.put("a", b"x")
    with pytest.raises(RepositoryRefused, match="a/b"):
        await store.put("a/b", b"x")
    assert await store.get("a/b") is None


async def test_a_directory_that_went_away_is_not_an_empty_repository(store: ObjectStore, tmp_path: Path) -> None:
    await store.put("key", b"x")
    moved = tmp_path.with_name("moved")
    await asyncio.to_thread(tmp_path.rename, moved)
    for call in (store.get("key"), store.head("key"), store.check(), store.delete(["key"])):
        with pytest.raises(RepositoryRefused, match="does not exist"):
            await call
    await asyncio.to_thread(moved.rename, tmp_path)
    assert await store.get("key") is not None


async def test_a_directory_that_cannot_be_looked_at_is_not_said_to_be_absent(tmp_path: Path) -> None:
    store = DirectoryObjectStore(tmp_path / (256 * "x"))
    for call in (store.get("key"), store.put("key", b"x"), store.check(), store.delete(["key"])):
        with pytest.raises(RepositoryRefused, match="File name too long"):
            await call


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_directory_that_may_not_be_written_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    await asyncio.to_thread(tmp_path.chmod, 0o555)
    with pytest.raises(RepositoryRefused, match="Permission denied"):
        await store.put("key", b"x")
    await asyncio.to_thread(tmp_path.chmod, 0o755)


async def test_what_a_killed_process_left_is_removed_when_it_is_a_day_old(store: ObjectStore, tmp_path: Path) -> None:
    fresh, abandoned = tmp_path / "folder" / ".pitr-tmp-1", tmp_path / "folder" / ".pitr-tmp-2"
    fresh.parent.mkdir()
    for path in (fresh, abandoned):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    await store.put("folder/key", b"whole")
    assert {path.name for path in fresh.parent.iterdir()} == {"key", fresh.name}
