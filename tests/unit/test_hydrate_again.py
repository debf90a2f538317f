"""A base backup is fetched once: what is there already, complete and right, is neither downloaded nor written again."""

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data, integers, sampled_from

from agent.budget import MemoryBudget
from agent.errors import ConfigError, RepositoryCorrupt, RepositoryUnavailable
from agent.ports import OpenObject
from agent.repository.backup_manifest import ManifestDocument
from agent.repository.keys import manifest_key
from agent.restore.existing import FORMER_CONTROL_FILE, holds_data, take_over
from agent.restore.hydrate import finish, hydrate
from agent.restore.marker import MARKER_NAME
from agent.restore.parts_done import FOLDER
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.progress import Progress
from tests.support.object_formats import LZ4, ZSTD
from tests.support.walg_backup import (
    SMALL,
    SYSTEM_IDENTIFIER,
    BackupContent,
    Members,
    control_file,
    increment_of,
    label,
    plan_of,
    state_after,
)


class CountingStore(MemoryObjectStore):
    """Writes down what is opened; breaks at the n-th tar, in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.left = -1

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        is_tar = "tar_partitions" in key
        self.left -= is_tar
        async with super().open(key) as found:
            if is_tar:
                self.opened.append(key.rpartition("/")[2].partition(".")[0])
            yield OpenObject(found.info, broken(found)) if found and is_tar and self.left == 0 else found


async def broken(found: OpenObject) -> AsyncIterator[bytes]:
    async for piece in found:
        yield piece[: len(piece) // 2]
    raise RepositoryUnavailable("the store went away")


class Place:
    """A store, and a directory that has a marker."""

    def __init__(self, path: Path) -> None:
        self.store = CountingStore()
        self.path = path
        self.directory = path / "data"
        self.directory.mkdir()
        self.reported: list[Progress] = []
        self.opened_when_freed: list[list[str]] = []  # for each time that memory was given back: which tars had been
        self.mark()

    def mark(self) -> None:
        (self.directory / MARKER_NAME).write_text("{}")

    async def put(self, *chain: BackupContent) -> None:
        for content in chain:
            await content.put(self.store)

    async def put_manifest(self, content: BackupContent, files: Mapping[str, bytes]) -> None:
        document = ManifestDocument()
        for name, body in files.items():
            document.add_content(name.lstrip("/"), body)
        document.add_content("backup_label", label(content.start_lsn))
        manifest = b"".join(
            document.chunks(pg_version=150020, system_identifier=SYSTEM_IDENTIFIER, timeline=1, start_lsn=1, stop_lsn=2)
        )
        document.close()
        await self.store.put(manifest_key(content.backup.name), ZSTD.encode(manifest))

    async def hydrate(self, *chain: BackupContent, keep_matching: bool = False) -> None:
        self.store.opened.clear()
        await hydrate(
            self.store,
            LZ4,
            plan_of(*chain),
            self.directory,
            tablespace_map={},
            concurrency=2,
            report=self.reported.append,
            budget=MemoryBudget(1),
            keep_matching=keep_matching,
            free_memory=lambda: self.opened_when_freed.append(list(self.store.opened)),
        )

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.directory)): path.read_bytes()
            for path in self.directory.rglob("*")
            if path.is_file() and "pitr" not in path.name and FOLDER not in path.parts
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


LAST = ["backup_label", "pg_control"]
MANY: Sequence[Members] = [
    SMALL,
    {"/base/1/100": b"a" * 9000, "/base/1/empty": None},
    {"/base/1/101": b"b"},
    {"/base/2": None, "/base/2/102": b"c"},
]


def content_of(parts: Sequence[Members]) -> dict[str, bytes]:
    return {name.lstrip("/"): body for part in parts for name, body in part.items() if body is not None}


@pytest.mark.parametrize("breaks_at", range(1, 7))
async def test_a_tar_that_is_done_is_not_downloaded_again(place: Place, breaks_at: int) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    place.store.left = breaks_at
    with pytest.raises((RepositoryUnavailable, RepositoryCorrupt)):
        await place.hydrate(content)
    done = {path.name.rpartition("tar_partitions_")[2] for path in (place.directory / FOLDER).glob("base*")}
    done = {name.partition(".")[0] for name in done}
    (place.directory / "global").mkdir(exist_ok=True)
    (place.directory / "global" / "stray").write_bytes(b"x")
    await place.hydrate(content)
    assert sorted(place.store.opened) == sorted({*LAST, *({f"part_00{n}" for n in range(1, 5)} - done)})
    assert place.reported[-1].ratio == 1.0
    await finish(place.directory)
    assert {name: body for name, body in place.files().items() if name in content_of(MANY)} == content_of(MANY)
    assert not (place.directory / "global" / "stray").exists()
    assert (place.directory / "base/1/empty").is_dir()
    assert not (place.directory / FOLDER).exists()


@pytest.mark.parametrize(
    "damaged", [lambda _: b"", lambda _: b"{}\n", lambda record: record[:-8], lambda record: record[:-1] + b"?"]
)
async def test_a_damaged_record_is_none(place: Place, damaged: Callable[[bytes], bytes]) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    await place.hydrate(content)
    (record,) = (place.directory / FOLDER).glob("*part_002*")
    record.write_bytes(damaged(record.read_bytes()))
    await place.hydrate(content)
    assert sorted(place.store.opened) == sorted([*LAST, "part_002"])
    await finish(place.directory)
    assert {name: body for name, body in place.files().items() if name in content_of(MANY)} == content_of(MANY)


async def test_what_reading_the_lists_took_is_given_back_before_the_first_tar(place: Place) -> None:
    content = BackupContent()
    await place.put(content)
    await place.hydrate(content)
    assert place.opened_when_freed == [[]]
    assert place.store.opened


async def test_another_backup_begins_anew(place: Place) -> None:
    content, other = BackupContent(parts=MANY), BackupContent(start_lsn=0xA00028, parts=MANY[:2])
    await place.put(content, other)
    await place.hydrate(content)
    await place.hydrate(other)
    assert len(place.store.opened) == 4
    assert "base/2/102" not in place.files()


async def test_a_tar_that_was_replaced_begins_anew(place: Place) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    await place.hydrate(content)
    await place.hydrate(content)
    assert sorted(place.store.opened) == LAST
    await place.put(content)  # stored again, later
    await place.hydrate(content)
    assert len(place.store.opened) == 6


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=data())
async def test_a_chain_that_is_cut_anywhere_ends_as_if_it_had_not_been(
    drawn: DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = Place(tmp_path_factory.mktemp("cut"))
    chain, state = state_after(drawn, drawn.draw(integers(1, 4)))
    await place.put(*chain)
    await place.put_manifest(chain[-1], state)
    for _ in range(drawn.draw(integers(0, 4))):
        place.store.left = drawn.draw(integers(1, 6))
        try:
            await place.hydrate(*chain)
        except (RepositoryUnavailable, RepositoryCorrupt):
            place.store.left = -1
        if drawn.draw(integers(0, 3)) == 0:
            (place.directory / "base" / "1").mkdir(parents=True, exist_ok=True)
            (place.directory / "base" / "1" / "77777").write_bytes(b"stray")
        for record in sorted((place.directory / FOLDER).glob("base*")):
            if drawn.draw(integers(0, 9)) == 0:
                record.write_bytes(record.read_bytes()[: -drawn.draw(sampled_from([1, 4, 8]))])
    place.store.left = -1
    await place.hydrate(*chain, keep_matching=drawn.draw(integers(0, 1)) == 1)
    await finish(place.directory)
    found = place.files()
    assert {name: found[name] for name in found if name.startswith("base/")} == {
        name: body for name, body in state.items() if name.startswith("base/")
    }


async def test_a_tar_of_an_older_backup_with_nothing_wanted_is_not_downloaded(place: Place) -> None:
    old, new = b"\1" * 8192 * 3, b"\2" * 8192 * 3
    full = BackupContent(
        parts=[SMALL, {"/base/1/1": old}, {"/base/1/2": old}, {"/base/1/3": old}],
        sets={
            "part_001.tar.lz4": list(SMALL), "part_002.tar.lz4": ["/base/1/1"], "part_003.tar.lz4": ["/base/1/2"],
            "part_004.tar.lz4": ["/base/1/3"],
        },
    )  # fmt: skip
    changed: Members = {
        "/base/1/1": increment_of(new, [0, 1, 2]),
        "/base/1/2": increment_of(new, [1]),
        "/base/1/3": new,
    }
    delta = BackupContent(start_lsn=0xA00028, parent=full.backup, parts=[{**SMALL, **changed}])
    delta.files = {name: {} for name in (*SMALL, "/base/1/3")} | {
        f"/base/1/{n}": {"IsIncremented": True} for n in (1, 2)
    }
    await place.put(full, delta)
    await place.hydrate(full, delta)
    assert sorted(place.store.opened) == ["backup_label", "part_001", "part_003", "pg_control"]
    assert place.files()["base/1/1"] == place.files()["base/1/3"] == new
    assert place.files()["base/1/2"] == old[:8192] + new[:8192] + old[:8192]


async def test_a_file_that_is_not_what_the_manifest_says_is_named_with_its_object(place: Place) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    await place.put_manifest(content, {**content_of(MANY), "base/1/101": b"B"})
    with pytest.raises(RepositoryCorrupt, match=r"base/1/101 in .*part_003\.tar\.lz4 is not as long as .*manifest"):
        await place.hydrate(content)


async def test_a_file_of_a_chain_that_is_not_what_the_manifest_says_is_named(place: Place) -> None:
    old, new = b"\1" * 8192 * 2, b"\2" * 8192 * 2
    full = BackupContent(parts=[{**SMALL, "/base/1/1": old}])
    delta = BackupContent(start_lsn=0xA00028, parent=full.backup)
    delta.parts = [{**SMALL, "/base/1/1": increment_of(new, [1])}]
    delta.files = {**{name: {} for name in SMALL}, "/base/1/1": {"IsIncremented": True}}
    await place.put(full, delta)
    await place.put_manifest(delta, {**content_of([SMALL]), "base/1/1": new})
    with pytest.raises(RepositoryCorrupt, match="base/1/1, put together from the base backups up to"):
        await place.hydrate(full, delta)


async def test_a_file_that_only_the_manifest_lists_is_missed(place: Place) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    await place.put_manifest(content, {**content_of(MANY), "base/1/9": b""})
    with pytest.raises(RepositoryCorrupt, match="lacks 1 of the files in"):
        await place.hydrate(content)


def server_at(directory: Path, files: Mapping[str, bytes], *, state: int = 1) -> None:
    """Make a data directory of a server that was stopped (1) or killed (6)."""
    for name in ("base/1/empty", "pg_wal", "global"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(body)
    (directory / "global" / "pg_control").write_bytes(control_file(state=state))


async def test_over_an_existing_directory_only_what_differs_is_written(place: Place) -> None:
    sets = {f"part_00{n}.tar.lz4": list(part) for n, part in enumerate(MANY, 1)}
    content = BackupContent(parts=MANY, sets=sets)
    await place.put(content)
    await place.put_manifest(content, content_of(MANY))
    here = {**content_of(MANY), "base/1/101": b"X", "base/3/9": b"dropped since", "postmaster.opts": b"x"}
    server_at(place.directory, here)
    (place.directory / MARKER_NAME).unlink()
    kept = (place.directory / "base/1/100").stat().st_mtime_ns
    assert holds_data(place.directory)
    take_over(place.directory, SYSTEM_IDENTIFIER)
    assert (place.directory / FORMER_CONTROL_FILE).exists()
    place.mark()
    await place.hydrate(content, keep_matching=True)
    await finish(place.directory)
    assert sorted(place.store.opened) == ["backup_label", "part_003", "pg_control"]
    assert (place.directory / "base/1/100").stat().st_mtime_ns == kept
    found = place.files()
    assert found["base/1/101"] == b"b"
    assert found["global/pg_control"] == control_file()
    assert not {"base/3/9", "postmaster.opts", FORMER_CONTROL_FILE} & found.keys()
    assert not (place.directory / "base/3").exists()


async def test_without_a_manifest_everything_is_written_anew(place: Place) -> None:
    content = BackupContent(parts=MANY)
    await place.put(content)
    server_at(place.directory, {**content_of(MANY), "base/1/100": b"b" * 9000, "base/3/9": b"dropped since"})
    (place.directory / MARKER_NAME).unlink()
    take_over(place.directory, SYSTEM_IDENTIFIER)
    place.mark()
    await place.hydrate(content, keep_matching=True)
    assert len(place.store.opened) == 6
    assert place.files()["base/1/100"] == b"a" * 9000
    assert "base/3/9" not in place.files()


@pytest.mark.parametrize(
    ("identifier", "more", "state", "said"),
    [
        (7, {}, 1, f"is of the database cluster {SYSTEM_IDENTIFIER}, but the base backup is of 7"),
        (None, {}, 1, "of one that it does not name"),
        (SYSTEM_IDENTIFIER, {"postmaster.pid": b"1\n/x\n0\n5432\n\nlocalhost\n"}, 1, "a server runs in"),
        (SYSTEM_IDENTIFIER, {"pg_wal/archive_status/000000010000000000000009.ready": b""}, 1, "1 WAL files"),
        (SYSTEM_IDENTIFIER, {"pg_wal/000000010000000000000009": b""}, 6, "was not stopped cleanly"),
    ],
)
def test_what_must_not_be_restored_over_is_left_alone(
    tmp_path: Path, identifier: int | None, more: Mapping[str, bytes], state: int, said: str
) -> None:
    server_at(tmp_path, {**content_of(MANY), **more}, state=state)
    with pytest.raises(ConfigError, match=said):
        take_over(tmp_path, identifier)
    assert (tmp_path / "global/pg_control").exists()


def test_a_directory_that_is_of_no_cluster_is_not_restored_over(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match="has no global/pg_control"):
        take_over(tmp_path, SYSTEM_IDENTIFIER)
    (tmp_path / "global").mkdir()
    (tmp_path / "global/pg_control").write_bytes(os.urandom(8192))
    with pytest.raises(ConfigError, match="pg_control"):
        take_over(tmp_path, SYSTEM_IDENTIFIER)
