"""A base backup that cannot be completed leaves nothing, says why, and does not hinder the next one."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.backup.taker import BackupTaker
from agent.domain.catalog import Backup
from agent.errors import BackupFailed, RepositoryUnavailable
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.ports import BackupSession, BackupStop, Body, ServerInfo
from agent.postgres.connection import PostgresServer
from agent.repository.backups import read_catalog, read_sentinel
from agent.repository.keys import files_metadata_key, sentinel_key, tar_folder
from agent.settings import PostgresSettings
from tests.support.base_backup import BackupLab, QuickClock, RecordingStore, start_lab
from tests.support.postgres import MakeCluster, copy_if_there
from tests.support.repository import read_files_metadata

DEADLINE = 60


@pytest.fixture
def lab(make_cluster: MakeCluster, lab_directory: Path) -> BackupLab:
    """A running PostgreSQL 15 that archives into a directory."""
    return start_lab(make_cluster(15), lab_directory)


def nothing(_: object) -> None:
    """Report to nobody."""


def backup_objects(lab: BackupLab) -> set[str]:
    return {key for key in lab.store.keys() if key.startswith("basebackups_005/")}  # noqa: SIM118 - a method


async def fails(lab: BackupLab, taker: BackupTaker) -> str:
    """Take a backup that must fail; return why, after checking that nothing of it is left."""
    with pytest.raises(BackupFailed) as caught:
        async with asyncio.timeout(DEADLINE):
            await taker.take(nothing)
    assert backup_objects(lab) == set()
    assert lab.metrics.backup_in_progress._value.get() == 0
    return caught.value.one_line()


async def succeeds(lab: BackupLab) -> Backup:
    """Take a backup; return it, after checking that it is the only one."""
    lab.store.before_put = None
    backup = await lab.taker().take(nothing)
    assert [found.name for found in await read_catalog(lab.store)] == [backup.name]
    return backup


def at_put(number: int, action: Callable[[], Awaitable[None]]) -> Callable[[str], Awaitable[None]]:
    """Do `action` before the `number`th object is stored."""
    seen = 0

    async def before_put(key: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            await action()

    return before_put


async def test_whichever_object_cannot_be_stored_nothing_is_left(lab: BackupLab) -> None:
    async def refuse() -> None:
        raise RepositoryUnavailable("the store is away")

    for number in range(1, 9):
        lab.store.before_put = at_put(number, refuse)
        lab.store.stored.clear()
        assert "the store is away" in await fails(lab, lab.taker(parallel_parts=1, part_bytes=16 << 20))
        assert len(lab.store.stored) == number - 1
    lab.store.stored.clear()
    lab.store.before_put = None
    await lab.taker(parallel_parts=1, part_bytes=16 << 20).take(nothing)
    assert len(lab.store.stored) == 8


async def test_a_killed_session_fails_the_backup(lab: BackupLab) -> None:
    async def kill() -> None:
        await asyncio.to_thread(
            lab.cluster.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pitr base backup'",
        )

    lab.store.before_put = at_put(2, kill)
    assert "terminating connection due to administrator command" in await fails(lab, lab.taker())
    await succeeds(lab)


async def test_a_lost_session_is_noticed_while_files_are_still_copied(lab: BackupLab) -> None:
    async def kill_and_hang() -> None:
        await asyncio.to_thread(lab.cluster.kill)
        await asyncio.Event().wait()

    lab.store.before_put = at_put(2, kill_and_hang)
    assert "cannot keep the base backup's session" in await fails(lab, lab.taker(clock=QuickClock()))
    lab.cluster.start()
    await succeeds(lab)


async def test_a_server_restarted_meanwhile_fails_the_backup(lab: BackupLab) -> None:
    async def restart() -> None:
        await asyncio.to_thread(lab.cluster.restart, "immediate")

    lab.store.before_put = at_put(1, restart)
    assert "the base backup" in await fails(lab, lab.taker())
    await succeeds(lab)


async def test_a_cancelled_backup_leaves_nothing(lab: BackupLab) -> None:
    hanging = asyncio.Event()

    async def hang() -> None:
        hanging.set()
        await asyncio.Event().wait()

    for number in (1, 3, 9):
        hanging.clear()
        lab.store.before_put = at_put(number, hang)
        task = asyncio.create_task(lab.taker().take(nothing))
        async with asyncio.timeout(DEADLINE):
            await hanging.wait()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert backup_objects(lab) == set()
    await succeeds(lab)


async def test_only_one_backup_runs_at_a_time(lab: BackupLab) -> None:
    taker = lab.taker()

    async def second() -> None:
        with pytest.raises(BackupFailed, match="already running"):
            await taker.take(nothing)

    lab.store.before_put = at_put(1, second)
    await taker.take(nothing)
    assert len(await read_catalog(lab.store)) == 1
    await taker.take(nothing)
    assert len(await read_catalog(lab.store)) == 2


async def test_wal_that_is_not_archived_in_time_fails_the_backup_and_is_named(lab: BackupLab) -> None:
    lab.cluster.execute("ALTER SYSTEM SET archive_command = 'false'", "SELECT pg_reload_conf()")
    reason = await fails(lab, lab.taker(wal_seconds=0.5, clock=QuickClock()))
    assert lab.store.stored[-1].endswith("/files_metadata.json")  # all but the sentinel is stored meanwhile
    assert "of the 2 WAL files that the base backup needs are not archived after 0.5 s; the first is 0000" in reason
    assert "pg_stat_archiver" in reason
    lab.cluster.execute("ALTER SYSTEM RESET archive_command", "SELECT pg_reload_conf()")
    await succeeds(lab)


def write_segments(cluster: PostgresCluster, count: int) -> list[str]:
    """Fill and archive `count` WAL segments; return their names."""
    names = []
    for _ in range(count):
        cluster.execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
        names.append(cluster.switch_wal())
    cluster.wait_until_archived(names[-1])
    return names


async def test_a_missing_segment_in_the_middle_is_waited_for(lab: BackupLab) -> None:
    wal = lab.store.root / "wal_005"
    names: list[str] = []

    async def write_and_lose_a_segment() -> None:
        names.extend(await asyncio.to_thread(write_segments, lab.cluster, 3))
        (wal / names[1]).rename(wal / f".pitr-tmp-{names[1]}")

    lab.store.before_put = at_put(1, write_and_lose_a_segment)
    reason = await fails(lab, lab.taker(wal_seconds=2))
    assert (
        f"of the 5 WAL files that the base backup needs are not archived after 2 s; the first is {names[1]}" in reason
    )


async def test_a_name_that_is_taken_is_never_used_again(lab: BackupLab) -> None:
    first = await lab.taker().take(nothing)
    part = tar_folder(first.name) + "part_001.tar.zst"
    leftovers = {part.replace(first.name[-8:], f"{int(first.name[-8:], 16) + ahead:08X}") for ahead in (1, 2, 3)}
    for key in leftovers:
        await lab.store.put(key, b"left by somebody")
    with pytest.raises(BackupFailed, match=r"already holds basebackups_005/base_.*part_001"):
        await lab.taker().take(nothing)
    assert leftovers < backup_objects(lab)


@pytest.mark.parametrize("number", [3, 8])
async def test_a_backup_that_another_server_completed_under_the_same_name_is_left_alone(
    lab: BackupLab, number: int
) -> None:
    theirs: list[str] = []

    async def complete() -> None:
        folder = next(key for key in lab.store.stored if "/tar_partitions/" in key).split("/")[1]
        theirs.append(sentinel_key(folder))
        (lab.store.root / theirs[0]).write_bytes(b'{"LSN": 1}')
        if number < 8:
            raise RepositoryUnavailable("the store is away")

    lab.store.before_put = at_put(number, complete)
    with pytest.raises(BackupFailed, match=r"the store is away|was completed meanwhile"):
        await lab.taker(parallel_parts=1, part_bytes=16 << 20).take(nothing)
    assert (lab.store.root / theirs[0]).read_bytes() == b'{"LSN": 1}'
    assert len(backup_objects(lab)) == number


async def test_a_sentinel_stored_although_the_answer_was_lost_is_removed_again(lab: BackupLab) -> None:
    class LosingStore(RecordingStore):
        async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
            await super().put_if_absent(key, body, metadata=metadata)
            raise RepositoryUnavailable("the answer was lost")

    lab.store = LosingStore(lab.store.root)
    assert "the answer was lost" in await fails(lab, lab.taker())


async def test_a_sentinel_stored_by_an_earlier_attempt_of_the_same_call_counts(lab: BackupLab) -> None:
    class RepeatingStore(RecordingStore):
        async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
            await super().put_if_absent(key, body, metadata=metadata)
            return await super().put_if_absent(key, body, metadata=metadata)

    lab.store = RepeatingStore(lab.store.root)
    await succeeds(lab)


async def test_a_clone_of_the_data_directory_is_refused(lab: BackupLab, lab_directory: Path) -> None:
    clone = lab_directory / "clone"
    shutil.copytree(lab.cluster.data_directory, clone, symlinks=True, copy_function=copy_if_there)
    assert "it is a copy of the server's data directory" in await fails(lab, lab.taker(data_directory=clone))


async def test_a_clone_that_went_on_by_itself_is_refused(lab: BackupLab, lab_directory: Path) -> None:
    lab.cluster.stop()
    with PostgresCluster(lab_directory / "clone", lab.cluster.binaries) as clone:
        shutil.copytree(lab.cluster.data_directory, clone.data_directory, symlinks=True)
        hand_over(clone.data_directory)
        clone.configure(archive_mode="off")
        clone.start()
        lab.cluster.start()
        for _ in range(3):  # a segment each; the base backup begins one
            clone.execute("CREATE TABLE passing AS SELECT 1", "SELECT pg_switch_wal()", "DROP TABLE passing")
        clone.execute("CHECKPOINT")
        taker = lab.taker(data_directory=clone.data_directory)
        assert "it is a copy of the server's data directory" in await fails(lab, taker)


def checkpoint(cluster: PostgresCluster) -> None:
    cluster.execute("CREATE TABLE since AS SELECT 1", "DROP TABLE since", "CHECKPOINT")


class CheckpointingServer(PostgresServer):
    """Somebody makes checkpoints: right after the one that a base backup begins with, and around every question."""

    def __init__(self, cluster: PostgresCluster, settings: PostgresSettings) -> None:
        super().__init__(settings)
        self.cluster = cluster

    async def server(self) -> ServerInfo:
        checkpoint(self.cluster)
        info = await super().server()
        checkpoint(self.cluster)
        return info

    @asynccontextmanager
    async def backup_session(self) -> AsyncIterator[BackupSession]:
        async with super().backup_session() as session:
            yield CheckpointingSession(session, self.cluster)


@dataclass
class CheckpointingSession:
    session: BackupSession
    cluster: PostgresCluster

    async def start(self, label: str, *, fast: bool = True) -> int:
        started = await self.session.start(label, fast=fast)
        checkpoint(self.cluster)
        return started

    async def stop(self) -> BackupStop:
        return await self.session.stop()

    async def ping(self) -> None:
        await self.session.ping()


async def test_checkpoints_right_after_the_start_make_no_copy_of_the_data_directory(lab: BackupLab) -> None:
    server = CheckpointingServer(lab.cluster, lab.settings())
    backup = await lab.taker(server=server).take(nothing)
    assert [found.name for found in await read_catalog(lab.store)] == [backup.name]


async def test_another_clusters_data_directory_is_refused(lab: BackupLab, make_cluster: MakeCluster) -> None:
    other = make_cluster(15, name="other", fresh=True)
    reason = await fails(lab, lab.taker(data_directory=other.data_directory))
    assert f"{other.data_directory} is of database cluster" in reason
    assert "set PGDATA" in reason


async def test_a_repository_of_another_cluster_is_refused(
    lab: BackupLab, make_cluster: MakeCluster, lab_directory: Path
) -> None:
    await lab.taker().take(nothing)
    before = lab.store.keys()
    lab.cluster.stop()
    other = BackupLab(make_cluster(15, name="other", fresh=True, archive_mode="on", archive_command="true"), lab.store)
    other.cluster.start()
    with pytest.raises(BackupFailed, match="the repository belongs to database cluster"):
        await other.taker().take(nothing)
    assert backup_objects(lab) == {key for key in before if key.startswith("basebackups_005/")}


async def test_a_server_that_does_not_archive_is_refused(make_cluster: MakeCluster, lab: BackupLab) -> None:
    lab.cluster.stop()
    lab.cluster.configure(archive_mode="off")
    lab.cluster.start()
    assert "archive_mode=off" in await fails(lab, lab.taker())
    lab.cluster.stop()
    lab.cluster.configure(archive_mode="on", archive_command="")
    lab.cluster.start()
    assert "archive_command is empty" in await fails(lab, lab.taker())


async def test_a_standby_is_refused(lab: BackupLab) -> None:
    lab.cluster.stop()
    (lab.cluster.data_directory / "standby.signal").touch()
    hand_over(lab.cluster.data_directory / "standby.signal")
    lab.cluster.start()
    assert "the server is in recovery" in await fails(lab, lab.taker())


async def test_a_missing_data_directory_is_named(lab: BackupLab, lab_directory: Path) -> None:
    assert str(lab_directory / "nowhere") in await fails(lab, lab.taker(data_directory=lab_directory / "nowhere"))


async def test_a_server_that_is_down_is_named(lab: BackupLab) -> None:
    lab.cluster.stop()
    reason = await fails(lab, lab.taker())
    assert "cannot connect to PostgreSQL at" in reason


async def test_a_damaged_page_is_reported_and_does_not_fail_the_backup(lab: BackupLab) -> None:
    lab.cluster.execute("CREATE TABLE cold AS SELECT generate_series(1, 9999) AS id", "CHECKPOINT")
    stored = lab.cluster.value("SELECT pg_relation_filepath('cold')")
    with (lab.cluster.data_directory / stored).open("r+b") as file:
        file.seek(3 * 8192 + 5000)
        file.write(b"\x55")
    backup = await lab.taker().take(nothing)
    document = json.loads((lab.store.root / files_metadata_key(backup.name)).read_bytes())
    damaged = {name: entry["CorruptBlocks"] for name, entry in document["Files"].items() if "CorruptBlocks" in entry}
    assert damaged == {f"/{stored}": {"CorruptBlocksCount": 1, "SomeCorruptBlocks": [3]}}
    assert [each.corrupt_pages for each in [backup, *await read_catalog(lab.store)]] == [1, 1]


async def test_a_tablespace_is_backed_up_with_its_place(lab: BackupLab, lab_directory: Path) -> None:
    location = lab_directory / "space"
    location.mkdir()
    hand_over(location)
    lab.cluster.execute(
        f"CREATE TABLESPACE space LOCATION '{location}'",
        "CREATE TABLE t TABLESPACE space AS SELECT generate_series(1, 9)",
    )
    backup = await lab.taker().take(nothing)
    sentinel, files = await read_sentinel(lab.store, backup.name), await read_files_metadata(lab.store, backup.name)
    assert list(sentinel.tablespaces.values()) == [str(location)]
    assert sentinel.data_directory == str(lab.cluster.data_directory)
    (oid,) = sentinel.tablespaces
    stored = lab.cluster.value("SELECT pg_relation_filepath('t')")
    assert f"/{stored}" in files["Files"]
    assert f"/pg_tblspc/{oid}" not in files["Files"]
