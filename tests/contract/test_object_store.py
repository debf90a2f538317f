"""One suite for every `ObjectStore`: S3 (SeaweedFS), a directory, and memory, which services are tested on."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.errors import RepositoryRefused
from agent.ports import Body, ObjectInfo, ObjectStore, StoredObject
from agent.settings import load_settings
from agent.storage.clock import SystemClock
from agent.storage.connect import open_store
from agent.storage.memory import MemoryObjectStore
from agent.storage.s3_upload import PART_BYTES
from agent.telemetry.metrics import Metrics

MIB = 1 << 20


async def open_repository(environment: dict[str, str]) -> ObjectStore:
    """Open a store as the agent does, without retries."""
    metrics = Metrics(CollectorRegistry())
    return await open_store(load_settings(environment), metrics, SystemClock(), retry_seconds=0)


@pytest.fixture(params=["s3", "directory", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    """An empty store of each kind."""
    opened: ObjectStore
    match request.param:
        case "s3":
            opened = await open_repository(request.getfixturevalue("s3_environment"))
        case "directory":
            opened = await open_repository({"WALG_FILE_PREFIX": str(tmp_path)})
        case _:
            opened = MemoryObjectStore()
    yield opened
    await opened.close()


@pytest.fixture(params=["s3", "directory"])
async def missing_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    """A store whose bucket or directory does not exist."""
    if request.param == "s3":
        environment = request.getfixturevalue("s3_environment")
        opened = await open_repository({**environment, "WALG_S3_PREFIX": "s3://no-such-bucket/wal"})
    else:
        opened = await open_repository({"WALG_FILE_PREFIX": str(tmp_path / "absent")})
    yield opened
    await opened.close()


async def keys(objects: AsyncIterator[ObjectInfo]) -> list[str]:
    return [info.key async for info in objects]


async def stream(*chunks: Body) -> AsyncIterator[Body]:
    for chunk in chunks:
        yield chunk


async def read_pieces(store: ObjectStore, key: str) -> list[bytes]:
    async with store.open(key) as pieces:
        assert pieces is not None
        return [piece async for piece in pieces]


async def read(store: ObjectStore, key: str) -> bytes:
    stored = await store.get(key)
    assert stored is not None
    assert stored.info.size == len(stored.body)
    return stored.body


async def test_an_absent_object_is_none(store: ObjectStore) -> None:
    await store.put("folder/other", b"x")
    for key in ("absent", "folder/absent", "folder", "folder/other/below"):
        assert await store.head(key) is None
        assert await store.get(key) is None
        async with store.open(key) as pieces:
            assert pieces is None


async def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    await store.put("wal_005/name.lz4", b"content")
    info = await store.head("wal_005/name.lz4")
    assert info is not None
    assert (info.key, info.size) == ("wal_005/name.lz4", 7)
    assert info.modified_at.tzinfo is UTC
    assert before <= info.modified_at <= datetime.now(UTC) + timedelta(seconds=2)
    assert await store.get("wal_005/name.lz4") == StoredObject(info, b"content")
    assert await read_pieces(store, "wal_005/name.lz4") == [b"content"]


async def test_put_replaces(store: ObjectStore) -> None:
    await store.put("key", b"the first, longer one")
    await store.put("key", b"the second")
    assert await read(store, "key") == b"the second"


async def test_put_if_absent_does_not_replace(store: ObjectStore) -> None:
    assert await store.put_if_absent("key", b"the first")
    assert not await store.put_if_absent("key", b"the second")
    assert await read(store, "key") == b"the first"


async def test_of_sixteen_racers_one_wins_and_its_bytes_are_held(store: ObjectStore) -> None:
    bodies = [bytes([racer]) * 100_000 for racer in range(16)]
    won = await asyncio.gather(*[store.put_if_absent("folder/key", body) for body in bodies])
    assert won.count(True) == 1
    assert await read(store, "folder/key") == bodies[won.index(True)]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_a_body_may_be_any_bytes_and_change_after_the_call(store: ObjectStore, kind: Callable[..., Body]) -> None:
    original = bytearray(b"content")
    body = kind(original)
    await store.put("put", body)
    await store.put_if_absent("put_if_absent", body)
    await store.put_stream("put_stream", stream(body, body))
    original[:] = b"changed"
    assert await read(store, "put") == b"content"
    assert await read(store, "put_if_absent") == b"content"
    assert await read(store, "put_stream") == b"contentcontent"


async def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    await store.put("put", b"")
    assert await store.put_if_absent("put_if_absent", b"")
    assert await store.put_stream("put_stream", stream()) == 0
    for key in ("put", "put_if_absent", "put_stream"):
        assert await read(store, key) == b""
        assert await read_pieces(store, key) == []
    assert await keys(store.list("")) == ["put", "put_if_absent", "put_stream"]


async def test_metadata_comes_back_with_lower_case_names(store: ObjectStore, request: pytest.FixtureRequest) -> None:
    metadata = {"Digest": "0a" * 32, "size-bytes": "16777216"}
    await store.put("put", b"x", metadata=metadata)
    await store.put_if_absent("put_if_absent", b"x", metadata=metadata)
    await store.put_stream("put_stream", stream(b"x"), metadata=metadata)
    await store.put_stream("in parts", stream(bytes(PART_BYTES + 1)), metadata=metadata)
    kept = {} if "directory" in request.node.name else {"digest": "0a" * 32, "size-bytes": "16777216"}
    for key in ("put", "put_if_absent", "put_stream", "in parts"):
        info = await store.head(key)
        assert info is not None
        assert info.metadata == kept
    assert [info.metadata async for info in store.list("")] == [{}] * 4


@pytest.mark.parametrize("size", [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 40 * MIB])
async def test_a_stream_is_stored_whole_and_read_in_small_pieces(store: ObjectStore, size: int) -> None:
    pattern = bytes(range(251)) * 8000
    sent, digest = 0, hashlib.sha1()

    async def chunks() -> AsyncIterator[Body]:
        nonlocal sent
        while sent < size:
            chunk = pattern[: size - sent]
            sent += len(chunk)
            digest.update(chunk)
            yield chunk

    assert await store.put_stream("folder/key", chunks()) == size
    pieces = await read_pieces(store, "folder/key")
    assert max(map(len, pieces)) <= MIB
    assert hashlib.sha1(b"".join(pieces)).digest() == digest.digest()


async def test_a_stream_of_one_large_chunk_is_stored(store: ObjectStore) -> None:
    body = bytes(range(256)) * (36 * MIB // 256)
    assert await store.put_stream("key", stream(body)) == len(body)
    assert await read(store, "key") == body


@pytest.mark.parametrize("good_chunks", [0, 1, 40])
async def test_a_stream_that_fails_leaves_what_was_there(store: ObjectStore, good_chunks: int) -> None:
    async def chunks() -> AsyncIterator[Body]:
        for _ in range(good_chunks):
            yield bytes(MIB)
        raise KeyError("the reader of the stream's source failed")

    await store.put("replaced", b"old")
    for key in ("new", "replaced"):
        with pytest.raises(KeyError, match="the reader of the stream's source failed"):
            await store.put_stream(key, chunks())
    assert await read(store, "replaced") == b"old"
    assert await keys(store.list("")) == ["replaced"]


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES, PART_BYTES + 1])
async def test_a_stream_does_not_replace_what_is_there_unless_it_may(store: ObjectStore, size: int) -> None:
    async def chunks(byte: bytes) -> AsyncIterator[Body]:
        for start in range(0, size, MIB):
            yield byte * min(MIB, size - start)

    assert await store.put_stream_if_absent("folder/key", chunks(b"1"), metadata={"n": "1"}) == size
    assert await store.put_stream_if_absent("folder/key", chunks(b"2"), metadata={"n": "2"}) is None
    assert await read(store, "folder/key") == b"1" * size
    assert await keys(store.list("")) == ["folder/key"]


async def test_of_racing_streams_one_wins_and_its_bytes_are_held(store: ObjectStore) -> None:
    bodies = [bytes([racer]) * MIB for racer in range(4)]
    sizes = await asyncio.gather(*[store.put_stream_if_absent("key", stream(*[body] * 17)) for body in bodies])
    assert sorted(size is None for size in sizes) == [False, True, True, True]
    assert await read(store, "key") == 17 * bodies[[size is None for size in sizes].index(False)]


async def test_a_stream_that_is_cancelled_leaves_nothing(store: ObjectStore) -> None:
    stalled = asyncio.Event()

    async def chunks() -> AsyncIterator[Body]:
        for _ in range(20):
            yield bytes(MIB)
        stalled.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        storing = group.create_task(store.put_stream("key", chunks()))
        await stalled.wait()
        storing.cancel()
    assert storing.cancelled()
    assert await keys(store.list("")) == []


async def test_a_list_is_in_key_order_below_a_prefix_and_after_a_key(
    store: ObjectStore, request: pytest.FixtureRequest
) -> None:
    present = ["B", "a", "a-/x", "a.b", "b/1", "b/10", "b/2/y", "b0", "bb/1", "é"]
    edges = ["b/", "b/1z"]
    if "s3" not in request.node.name:  # SeaweedFS, unlike S3, takes a folder by its name without the slash
        present.insert(6, "b/2.x")
        edges.append("b/2")
    for name in reversed(present):
        await store.put(name, b"x")
    assert await keys(store.list("")) == present
    assert await keys(store.list("b")) == [name for name in present if name.startswith("b")]
    assert await keys(store.list("b/")) == [name for name in present if name.startswith("b/")]
    assert await keys(store.list("b/1")) == ["b/1", "b/10"]
    assert await keys(store.list("b/2/y")) == ["b/2/y"]
    assert await keys(store.list("none")) == []
    for after in [*present, *edges]:
        assert await keys(store.list("b/", after=after)) == [n for n in present if n.startswith("b/") and n > after]


async def test_a_list_tells_size_and_time(store: ObjectStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    await store.put("folder/key", b"12345")
    for objects in (store.list("folder/"), store.list_folder("folder/")):
        (info,) = [info async for info in objects]
        assert (info.key, info.size) == ("folder/key", 5)
        assert before <= info.modified_at <= datetime.now(UTC) + timedelta(seconds=2)


async def test_a_folder_lists_what_is_directly_in_it(store: ObjectStore) -> None:
    for name in ("top", "f/a", "f/b/1", "f/b/2", "f/c", "ff/d"):
        await store.put(name, b"x")
    assert await keys(store.list_folder("f/")) == ["f/a", "f/c"]
    assert await keys(store.list_folder("f/b/")) == ["f/b/1", "f/b/2"]
    assert await keys(store.list_folder("absent/")) == []


async def test_thousands_of_objects_are_listed_and_deleted(store: ObjectStore) -> None:
    names = [f"wal_005/{number:024X}.zst" for number in range(2100)]
    turns = asyncio.Semaphore(16)

    async def put(name: str) -> None:
        async with turns:
            await store.put(name, b"")

    await asyncio.gather(*[put(name) for name in names])
    assert await keys(store.list("wal_005/")) == names
    assert await keys(store.list("", after=names[1500])) == names[1501:]
    assert await keys(store.list_folder("wal_005/")) == names
    assert not (await store.delete_many([*names[1100:], "absent"])).failed
    assert await keys(store.list("")) == names[:1100]
    await store.delete(names[1:])
    assert await keys(store.list("")) == names[:1]


async def test_a_repository_sees_nothing_of_another_whose_name_begins_like_its_own(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    for environment in (s3_environment, {"WALG_FILE_PREFIX": str(tmp_path / "db")}):
        name, prefix = next((name, value) for name, value in environment.items() if name.endswith("_PREFIX"))
        for path in (tmp_path / "db", tmp_path / "db10"):
            path.mkdir(exist_ok=True)
        ours = await open_repository(environment)
        theirs = await open_repository({**environment, name: f"{prefix}10"})
        for store in (ours, theirs):
            await store.put("wal_005/a", b"x")
        assert await keys(ours.list("")) == ["wal_005/a"]
        await ours.delete(await keys(ours.list("")))
        assert await keys(theirs.list("")) == ["wal_005/a"]
        await ours.close()
        await theirs.close()


async def test_a_list_may_be_left_early(store: ObjectStore) -> None:
    await store.put("a", b"x")
    await store.put("b", b"x")
    async with aclosing(store.list("")) as objects:  # type: ignore[type-var]  # all of ours are generators
        assert (await anext(objects)).key == "a"


async def test_deleting_the_absent_is_no_error(store: ObjectStore) -> None:
    await store.put("folder/key", b"x")
    await store.delete(["absent", "folder/key", "folder/absent", "absent/absent"])
    await store.delete(["folder/key"])
    await store.delete([])
    await store.put("folder/key", b"x")
    for many in (["absent", "folder/key", "absent/absent"], ["folder/key"], []):
        deletion = await store.delete_many(many)
        assert (deletion.failed, deletion.keeps_versions) == ({}, False)
    assert await keys(store.list("")) == []
    assert await store.deleted_versions("folder/") == {}


@pytest.mark.parametrize(
    "key",
    [
        "a b",
        "a+b",
        "a%2Fb",
        "a&b=c?d#e",
        'it\'s "quoted"',
        "<tag>",
        "ünï/cödé €",
        "a..b/c~",
        "colon:at@",
    ],
)
async def test_a_key_with_odd_characters_is_itself(store: ObjectStore, key: str) -> None:
    assert await store.put_if_absent(key, b"x")
    assert not await store.put_if_absent(key, b"y")
    assert await read(store, key) == b"x"
    assert await keys(store.list("")) == [key]
    assert await keys(store.list(key)) == [key]
    await store.delete([key])
    assert await store.head(key) is None


async def test_a_store_tells_its_time(store: ObjectStore) -> None:
    told = await store.time()
    assert told.tzinfo is UTC
    assert abs(datetime.now(UTC) - told) < timedelta(minutes=1)


async def test_a_store_that_is_there_passes_its_check(store: ObjectStore) -> None:
    await store.check()


CALLS: dict[str, Callable[[ObjectStore], Awaitable[object]]] = {
    "check": lambda store: store.check(),
    "head": lambda store: store.head("key"),
    "get": lambda store: store.get("key"),
    "open": lambda store: read_pieces(store, "key"),
    "put": lambda store: store.put("folder/key", b"x"),
    "put_if_absent": lambda store: store.put_if_absent("folder/key", b"x"),
    "put_stream": lambda store: store.put_stream("folder/key", stream(b"x")),
    "time": lambda store: store.time(),
    "put_stream_if_absent": lambda store: store.put_stream_if_absent("folder/key", stream(b"x")),
    "list": lambda store: keys(store.list("")),
    "list_folder": lambda store: keys(store.list_folder("folder/")),
    "delete": lambda store: store.delete(["key"]),
    "deleted_versions": lambda store: store.deleted_versions("key"),
    "delete_many": lambda store: store.delete_many(["key"]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_missing_bucket_or_directory_is_refused_and_never_absent(
    missing_store: ObjectStore, call: Callable[[ObjectStore], Awaitable[object]]
) -> None:
    with pytest.raises(RepositoryRefused, match="does not exist") as caught:
        await call(missing_store)
    assert "WALG_" in caught.value.hint
