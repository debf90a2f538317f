"""A directory is filled with exactly what base backups hold, or refused; it can start only when all is there."""

import os
import stat
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data, integers

from agent.errors import ConfigError, RepositoryCorrupt, RepositoryUnavailable, RestoreFailed
from agent.ports import OpenObject
from agent.repository.backups import read_sentinel
from agent.repository.keys import files_metadata_key, tar_folder
from agent.restore.hydrate import claim, finish, hydrate, is_writable
from agent.restore.marker import MARKER_NAME
from agent.restore.wanted import read_wanted_files
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.progress import Progress
from tests.support.object_formats import LZ4
from tests.support.walg_backup import (
    SMALL,
    BackupContent,
    Members,
    control_file,
    label,
    plan_of,
    state_after,
    tar_of,
)

CONTROL = "global/pg_control"


class Lab:
    """A store, a directory to restore into, and what hydrating reported."""

    def __init__(self, path: Path) -> None:
        self.store = MemoryObjectStore()
        self.path = path
        self.directory = path / "data"
        self.reported: list[Progress] = []
        self.moved: dict[str, str] = {}

    async def restore(self, *chain: BackupContent) -> None:
        for content in chain:
            await content.put(self.store)
        await claim(self.directory)
        await self.hydrate(*chain)

    async def hydrate(self, *chain: BackupContent) -> None:
        plan = plan_of(*chain)
        await hydrate(
            self.store,
            LZ4,
            plan,
            self.directory,
            tablespace_map=self.moved,
            concurrency=3,
            report=self.reported.append,
        )

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def names(self) -> set[str]:
        return {str(path.relative_to(self.directory)) for path in self.directory.rglob("*")}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def test_a_full_backup_gives_its_files_and_can_start_only_after_finish(lab: Lab) -> None:
    content = BackupContent()
    await lab.restore(content)
    assert CONTROL not in lab.names()
    for name, body in SMALL.items():
        assert body is None or lab.read(name.lstrip("/")) == body
    assert lab.read("backup_label") == label(content.start_lsn)
    await finish(lab.directory)
    assert lab.read(CONTROL) == control_file()
    assert not [name for name in lab.names() if "pitr" in name]


async def test_modes_let_only_the_owner_in_and_needed_directories_exist(lab: Lab) -> None:
    await lab.restore(BackupContent())
    assert stat.S_IMODE(lab.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((lab.directory / "PG_VERSION").stat().st_mode) == 0o600
    for name in ("pg_wal/archive_status", "pg_subtrans", "pg_logical/snapshots", "pg_notify", "pg_twophase"):
        assert stat.S_IMODE((lab.directory / name).stat().st_mode) == 0o700


async def test_progress_ends_at_the_size_of_what_is_stored(lab: Lab) -> None:
    await lab.restore(BackupContent())
    done = [progress.done for progress in lab.reported]
    assert done == sorted(done)
    assert (lab.reported[-1].ratio, lab.reported[-1].stage) == (1.0, "hydrating")


async def test_a_backup_through_the_replication_protocol_is_understood(lab: Lab) -> None:
    # Names without a slash, or with ./, the label in a part, pg_control in a part besides its own tar, no entry for
    # the data directory itself.
    part: dict[str, bytes | None] = {name.lstrip("/"): body for name, body in SMALL.items() if name != "/"}
    content = BackupContent()
    part |= {"./pg_wal/archive_status": None, "backup_label": label(content.start_lsn), "global/pg_control": b"old"}
    content.parts, content.last = [part], {"pg_control": {"global/pg_control": control_file()}}
    await lab.restore(content)
    await finish(lab.directory)
    assert lab.read("base/1/1259") == SMALL["/base/1/1259"]
    assert lab.read("backup_label") == label(content.start_lsn)
    assert lab.read(CONTROL) == control_file()
    assert stat.S_IMODE(lab.directory.stat().st_mode) == 0o700


async def test_a_label_in_a_part_is_taken_and_one_of_another_backup_is_not(lab: Lab) -> None:
    # WAL-G up to 3.0.4 has no backup_label.tar; a label left in the data directory is an ordinary file with a slash.
    content = BackupContent()
    stale: Members = {"/backup_label": label(0x100028), "/tablespace_map": b"1 /x\n", "/backup_label.old": b"x"}
    content.parts = [{**SMALL, **stale}, {"backup_label": label(content.start_lsn), "tablespace_map": b""}]
    content.files = {name: {} for name in (*SMALL, *stale)}
    content.last = {"pg_control": {"/global/pg_control": control_file()}}
    await lab.restore(content)
    assert lab.read("backup_label") == label(content.start_lsn)
    assert not {"tablespace_map", "backup_label.old"} & lab.names()


async def test_state_that_would_act_again_is_left_out(lab: Lab) -> None:
    stale = {"standby.signal", "recovery.signal", "recovery.conf", "postmaster.pid", "pg_replslot/slot/state"}
    stale |= {"pg_wal/000000010000000000000001", MARKER_NAME, "pitr.recovery.conf", "backup_manifest"}
    await lab.restore(BackupContent(parts=[{**SMALL, **{f"/{name}": b"x" for name in stale}}]))
    assert not lab.names() & stale


async def test_without_a_list_everything_is_restored(lab: Lab) -> None:
    content = BackupContent(sentinel={"FilesMetadataDisabled": True})
    await content.put(lab.store)
    await lab.store.delete([files_metadata_key(content.backup.name)])
    await claim(lab.directory)
    await lab.hydrate(content)
    assert lab.read("base/1/1259") == SMALL["/base/1/1259"]


async def test_a_file_that_is_not_listed_is_not_restored(lab: Lab) -> None:
    await lab.restore(BackupContent(parts=[{**SMALL, "/base/1/9999": b"x"}], files={name: {} for name in SMALL}))
    assert "base/1/9999" not in lab.names()


@pytest.mark.parametrize("name", ["../evil", "/../../evil", "base/../../evil", "/base/1/../../../evil"])
async def test_a_name_that_leads_elsewhere_is_refused(lab: Lab, name: str) -> None:
    with pytest.raises(RepositoryCorrupt, match="evil"):
        await lab.restore(BackupContent(parts=[{**SMALL, name: b"x"}], sentinel={"FilesMetadataDisabled": True}))
    assert not list(lab.path.rglob("evil"))


async def test_a_link_in_a_tar_is_never_followed(lab: Lab) -> None:
    outside = lab.path / "outside"
    outside.mkdir()
    content = BackupContent(sentinel={"FilesMetadataDisabled": True})
    await content.put(lab.store)
    hostile = tar_of(
        {**SMALL, "/base/2/16384": b"x", "/base/3": b"x"}, links={"/base/2": str(outside), "/base/3": "/x"}
    )
    await lab.store.put(f"{tar_folder(content.backup.name)}part_001.tar{LZ4.extension}", LZ4.encode(hostile))
    await claim(lab.directory)
    await lab.hydrate(content)
    assert list(outside.iterdir()) == []
    assert lab.read("base/2/16384") == b"x"


async def test_a_file_that_comes_twice_is_refused(lab: Lab) -> None:
    with pytest.raises(RepositoryCorrupt, match=r"holds PG_VERSION twice"):
        await lab.restore(BackupContent(parts=[SMALL, {"/PG_VERSION": b"16\n"}]))


async def test_a_listed_file_that_does_not_arrive_is_named(lab: Lab) -> None:
    files: dict[str, dict[str, bool]] = {name: {} for name in (*SMALL, "/base/1/2000")}
    with pytest.raises(RepositoryCorrupt, match=r"lacks 1 of the files it lists, as base/1/2000"):
        await lab.restore(BackupContent(files=files))


async def test_a_tar_known_to_be_missing_is_named_before_anything_is_downloaded(lab: Lab) -> None:
    content = BackupContent(sets={"part_001.tar.lz4": ["/PG_VERSION"], "part_002.tar.lz4": ["/base/1/1259"]})
    with pytest.raises(RepositoryCorrupt, match=r"lacks its part_002\.tar\.lz4"):
        await lab.restore(content)
    assert lab.reported == []
    assert lab.names() == set()


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"backup_label": {"backup_label": label(0x900028)}}, "holds no pg_control"),
        ({"pg_control": {"/global/pg_control": control_file()}}, "holds no backup_label"),
        ({"pg_control": {"/global/pg_control": bytes(8192)}}, "pg_control"),
        ({"pg_control": {"/global/pg_control": control_file(system_identifier=7)}}, "database cluster 7"),
        ({"pg_control": {"/global/pg_control": control_file(segment_bytes=1 << 24)}}, "segments of 16777216 bytes"),
    ],
)
async def test_a_backup_that_recovery_cannot_begin_from_is_refused(
    lab: Lab, last: Mapping[str, Members], said: str
) -> None:
    if "pg_control" in last and last["pg_control"]["/global/pg_control"] != control_file():
        last = {**last, "backup_label": {"backup_label": label(0x900028)}}
    with pytest.raises(RepositoryCorrupt, match=said):
        await lab.restore(BackupContent(last=last))


async def test_a_label_of_another_backup_is_refused(lab: Lab) -> None:
    last = {
        "pg_control": {"/global/pg_control": control_file()},
        "backup_label": {"backup_label": label(0x100028)},
    }
    with pytest.raises(RepositoryCorrupt, match=r"begins at 0/100028 by its backup_label, but at 0/900028"):
        await lab.restore(BackupContent(last=last))


async def test_a_damaged_tar_is_named_and_the_directory_cannot_start(lab: Lab) -> None:
    content = BackupContent()
    await content.put(lab.store)
    key = f"{tar_folder(content.backup.name)}part_001.tar{LZ4.extension}"
    stored = await lab.store.get(key)
    assert stored is not None
    await lab.store.put(key, stored.body[:-10])
    await claim(lab.directory)
    with pytest.raises(RepositoryCorrupt, match=key):
        await lab.hydrate(content)
    with pytest.raises(RestoreFailed, match="is not hydrated"):
        await finish(lab.directory)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class FailingStore(MemoryObjectStore):
    """Fails at the n-th object that is opened and there, in the middle of it."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self._left = fails_at

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        async with super().open(key) as found:
            self._left -= found is not None
            fails = self._left == 0 and found is not None
            yield OpenObject(found.info, broken()) if found is not None and fails else found


async def broken() -> AsyncIterator[bytes]:
    yield b"\x04"
    raise RepositoryUnavailable("the store went away")


@pytest.mark.parametrize("fails_at", range(1, 6))
async def test_a_restore_cut_at_any_object_begins_again_and_leaves_nothing_behind(lab: Lab, fails_at: int) -> None:
    lab.store = FailingStore(fails_at)
    content = BackupContent(tablespaces={16384: str(lab.path / "fast")})
    content.parts = [{**SMALL, "/pg_tblspc/16384/PG_15_202209061/5/16400": b"row"}]
    await content.put(lab.store)
    await claim(lab.directory)
    (lab.directory / MARKER_NAME).write_text("{}")
    with pytest.raises((RepositoryUnavailable, RepositoryCorrupt)):
        await lab.hydrate(content)
    assert CONTROL not in lab.names()
    (lab.directory / "base").mkdir(exist_ok=True)
    (lab.directory / "base" / "left-over").write_text("x")
    await lab.hydrate(content)
    await finish(lab.directory)
    assert "base/left-over" not in lab.names()
    assert lab.read("pg_tblspc/16384/PG_15_202209061/5/16400") == b"row"
    assert entries(lab.path / "fast") == ["PG_15_202209061"]


async def test_a_directory_that_holds_something_is_not_claimed(lab: Lab) -> None:
    lab.directory.mkdir()
    (lab.directory / "lost+found").mkdir()
    await claim(lab.directory)
    (lab.directory / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is not empty, it holds precious"):
        await claim(lab.directory)
    (lab.path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be restored into"):
        await claim(lab.path / "file")


@pytest.mark.parametrize("there", [["precious"], [MARKER_NAME, "precious", CONTROL]])
async def test_what_no_interrupted_restore_left_is_never_overwritten(lab: Lab, there: list[str]) -> None:
    content = BackupContent()
    await content.put(lab.store)
    for name in there:
        (lab.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (lab.directory / name).write_text("x")
    with pytest.raises(ConfigError, match="not what an interrupted restore left"):
        await lab.hydrate(content)
    assert set(there) <= lab.names()


def spread(*directories: Path) -> BackupContent:
    """A backup with a file in each of the tablespaces at `directories`."""
    content = BackupContent(tablespaces={16384 + index: str(path) for index, path in enumerate(directories)})
    files = {f"/pg_tblspc/{oid}/PG_15_202209061/5/16400": str(oid).encode() for oid in content.tablespaces}
    content.parts = [{**SMALL, **files}]
    return content


async def test_tablespaces_go_back_to_where_they_were_or_where_they_are_sent(lab: Lab) -> None:
    old, other, new = lab.path / "old", lab.path / "other", lab.path / "new"
    lab.moved = {str(other): str(new)}
    await lab.restore(spread(old, other))
    await finish(lab.directory)
    assert (lab.directory / "pg_tblspc/16384").readlink() == old
    assert (lab.directory / "pg_tblspc/16385").readlink() == new
    assert lab.read("pg_tblspc/16385/PG_15_202209061/5/16400") == b"16385"
    assert lab.read("tablespace_map").decode() == f"16384 {old}\n16385 {new}\n"
    assert not other.exists()
    assert entries(old) == ["PG_15_202209061"]


async def test_the_directory_of_a_tablespace_must_be_empty_and_can_be_moved(lab: Lab) -> None:
    old = lab.path / "old"
    old.mkdir()
    (old / "of another server").write_text("x")
    with pytest.raises(ConfigError, match="is not empty") as refused:
        await lab.restore(spread(old))
    assert "PITR_TABLESPACE_MAP" in refused.value.hint
    assert entries(old) == ["of another server"]


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ({"/nowhere": "/x"}, "names /nowhere, where this backup has no tablespace"),
        ({"{path}/a": "{path}/b"}, "would share one directory"),
        ({"{path}/a": "{path}/data/tablespace"}, "lies in the data directory"),
        ({"{path}/a": "/proc/tablespace"}, "cannot be used"),
    ],
)
async def test_a_map_of_tablespaces_that_cannot_be_meant_is_refused(
    lab: Lab, moved: Mapping[str, str], said: str
) -> None:
    lab.moved = {old.format(path=lab.path): new.format(path=lab.path) for old, new in moved.items()}
    with pytest.raises(ConfigError, match=said):
        await lab.restore(spread(lab.path / "a", lab.path / "b"))


async def test_a_tablespace_that_only_the_map_knows_is_refused(lab: Lab) -> None:
    content = BackupContent()
    content.last = {**content.last_tars(), "backup_label": {
        "backup_label": label(content.start_lsn), "tablespace_map": b"16384 /srv/fast\n"
    }}  # fmt: skip
    with pytest.raises(RepositoryCorrupt, match="tablespace 16384"):
        await lab.restore(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=data())
async def test_a_chain_of_deltas_gives_the_last_state(
    drawn: DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lab = Lab(tmp_path_factory.mktemp("chain"))
    chain, state = state_after(drawn, drawn.draw(integers(1, 4)))
    await lab.restore(*chain)
    await finish(lab.directory)
    assert {name: lab.read(name) for name in lab.names() if (lab.directory / name).is_file() and "base/" in name} == {
        name: body for name, body in state.items() if "base/" in name
    }
    assert lab.read("backup_label") == label(chain[-1].start_lsn)


async def test_a_delta_without_its_list_or_its_parents_files_is_refused(lab: Lab) -> None:
    full = BackupContent()
    delta = BackupContent(start_lsn=0xA00028, parent=full.backup, parts=[{"/PG_VERSION": b"15\n"}])
    delta.files = {"/PG_VERSION": {}, "/base/1/777": {"IsSkipped": True}}
    with pytest.raises(RepositoryCorrupt, match=r"does not list base/1/777"):
        await lab.restore(full, delta)
    delta.files = {}
    with pytest.raises(RepositoryCorrupt, match="its list of files is missing"):
        await lab.restore(full, delta)


async def test_of_the_lists_of_a_chain_only_one_is_in_memory_at_a_time(lab: Lab) -> None:
    names = [f"/base/5/{number}" for number in range(5_000)]
    chain = [BackupContent(files={name: {} for name in names})]
    for step in range(1, 9):
        skipped = {name: {"IsSkipped": True} for name in names}
        chain.append(BackupContent(0x900028 + 0x100000 * step, parent=chain[-1].backup, files=skipped))
    for content in chain:
        await content.put(lab.store)
    used: list[int] = []

    class Watched(MemoryObjectStore):
        @asynccontextmanager
        async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
            used.append(tracemalloc.get_traced_memory()[0])
            async with lab.store.open(key) as opened:
                yield opened

    sentinels = [await read_sentinel(lab.store, content.backup.name) for content in chain]
    await read_wanted_files(lab.store, sentinels)  # loads what is loaded once
    tracemalloc.start()
    try:
        await read_wanted_files(Watched(), sentinels)
    finally:
        tracemalloc.stop()
    assert len(used) == len(chain)
    # Seven lists more are nine bytes a file each, what is kept of them one. A thread may hold the last one still.
    assert used[-1] - used[1] <= 4 * 9 * len(names)


async def test_a_full_backup_that_needs_another_is_refused(lab: Lab) -> None:
    with pytest.raises(RepositoryCorrupt, match=r"is a full one, but does not hold PG_VERSION"):
        await lab.restore(BackupContent(files={"/PG_VERSION": {"IsSkipped": True}}))


async def test_a_list_kept_in_the_sentinel_is_honoured(lab: Lab) -> None:
    # WAL-G up to 1.0 has no files_metadata.json.
    embedded = {"Files": {name: {"MTime": "2026-11-22T20:00:00Z"} for name in SMALL}}
    content = BackupContent(parts=[{**SMALL, "/base/1/9999": b"x"}], sentinel=embedded)
    await content.put(lab.store)
    await lab.store.delete([files_metadata_key(content.backup.name)])
    await claim(lab.directory)
    await lab.hydrate(content)
    assert "base/1/9999" not in lab.names()


async def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch(mode=0o755)
    assert not is_writable(file)
    with pytest.raises(ConfigError, match="cannot be restored into"):
        await claim(file)


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A directory that may be read only."""
    tmp_path.chmod(0o500)
    yield tmp_path
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_directory_that_cannot_be_written_is_refused(unwritable: Path) -> None:
    assert not is_writable(unwritable)
    with pytest.raises(ConfigError, match="cannot be written"):
        await claim(unwritable)
