"""PostgreSQL itself drives the hooks; the agent and the S3 server are real; both are killed and brought back."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from agent.archive.backlog_watch import SAMPLE_SECONDS
from agent.errors import BackupFailed
from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, unprivileged
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.agent_process import MakeAgent, RunPitr
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.repository import read_keys, read_wal
from tests.support.stack import MakeStack, Stack

CLIENTS = 4


def pgbench(cluster: PostgresCluster, transactions: int) -> None:
    """Let each of `CLIENTS` do so many transactions; none of them may fail."""
    how = [f"--client={CLIENTS}", "--jobs=2", f"--transactions={transactions}", "--no-vacuum", "postgres"]
    said = cluster.run("pgbench", *how, seconds=300)
    assert "number of failed transactions: 0 (0.000%)" in said, said


def pgbench_until(enough: threading.Event, cluster: PostgresCluster) -> None:
    while not enough.is_set():
        pgbench(cluster, 500)


def finish_archiving(stack: Stack) -> str:
    """Switch to a new segment and wait until the one before it is archived; return its name."""
    segment = stack.cluster.switch_wal()
    stack.cluster.wait_until_archived(segment)
    return segment


@pytest.fixture
def loaded(stack: Stack) -> Stack:
    """A stack whose archive_command keeps a copy of each segment that the hook reported archived."""
    stack.keep_copies()
    stack.cluster.run("pgbench", "--initialize", "--scale=4", "--quiet", "postgres")
    return stack


def copied(stack: Stack) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stack.copies.iterdir()}


async def test_every_segment_of_a_load_is_archived_once_and_unchanged(loaded: Stack) -> None:
    await asyncio.to_thread(pgbench, loaded.cluster, 2500)
    await asyncio.to_thread(finish_archiving, loaded)

    expected = copied(loaded)
    stored = await read_wal(loaded.agent.settings)
    assert len(expected) > 20
    assert {name: contents for name, contents in stored.items() if name in expected} == {
        name: [content] for name, content in expected.items()
    }
    events = [line for line in loaded.agent.log_lines() if line["event"] == "wal archived"]
    uploads = [line["wal_file"] for line in events if not line["already_archived"]]
    assert sorted(uploads) == sorted(set(uploads))
    assert set(uploads) == set(stored)


async def test_killing_the_agent_under_load_loses_no_segment_and_fails_no_transaction(loaded: Stack) -> None:
    enough = threading.Event()
    load = asyncio.create_task(asyncio.to_thread(pgbench_until, enough, loaded.cluster))
    try:
        for kill in range(3):
            archived = len(list(loaded.copies.iterdir()))
            await asyncio.to_thread(
                wait_until,
                lambda archived=archived: len(list(loaded.copies.iterdir())) > archived + 3,
                seconds=60,
                what=f"segments to be archived before kill {kill}",
            )
            loaded.agent.kill()
            await asyncio.to_thread(loaded.agent.start)
    finally:
        enough.set()
        await load
    last = await asyncio.to_thread(finish_archiving, loaded)

    stored = await read_wal(loaded.agent.settings)
    assert {name: [content] for name, content in copied(loaded).items()}.items() <= stored.items()
    segments = [name for name in stored if len(name) == 24]
    first = min(segments)
    assert int(last[16:], 16) - int(first[16:], 16) + 1 == len(segments), "a segment is missing"
    # The hooks waited for the agent: PostgreSQL saw no failure.
    assert loaded.cluster.value("SELECT failed_count FROM pg_stat_archiver") == 0


def hook(stack: Stack, *arguments: str, patience: int = 60) -> "subprocess.CompletedProcess[str]":
    """Run a hook as PostgreSQL would, with so many seconds of patience."""
    return subprocess.run(
        unprivileged(arguments),
        cwd=stack.cluster.data_directory,
        env={"PITR_SOCKET": str(stack.agent.socket), "PITR_HOOK_TIMEOUT": str(patience), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


async def test_while_s3_is_down_nothing_counts_as_archived_or_absent_and_then_all_goes_on(
    stack: Stack, s3_server_of_its_own: SeaweedServer
) -> None:
    archive, restore = str(stack.hooks / "wal-archive.sh"), str(stack.hooks / "wal-restore.sh")
    before = await asyncio.to_thread(finish_archiving, stack)
    target = stack.cluster.data_directory / "pg_wal" / "RECOVERYXLOG"

    s3_server_of_its_own.stop()
    stack.cluster.execute("CREATE TABLE during_the_outage AS SELECT generate_series(1, 1000)")
    stuck = stack.cluster.switch_wal()
    for name in (before, stuck, "000000010000000000000FFF", "00000002.history"):
        done = await asyncio.to_thread(hook, stack, restore, name, "pg_wal/RECOVERYXLOG", patience=2)
        assert done.returncode == 255, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not target.exists()
    done = await asyncio.to_thread(hook, stack, archive, f"pg_wal/{stuck}", stuck, patience=2)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    status = stack.cluster.data_directory / "pg_wal" / "archive_status"
    assert (status / f"{stuck}.ready").exists()
    assert stack.agent.get("/readyz")[0] == 200

    s3_server_of_its_own.start()
    await asyncio.to_thread(stack.cluster.wait_until_archived, stuck, seconds=90)
    assert stuck in await read_wal(stack.agent.settings)
    done = await asyncio.to_thread(hook, stack, restore, "00000002.history", "pg_wal/RECOVERYHISTORY")
    assert done.returncode == 1, done.stderr
    done = await asyncio.to_thread(hook, stack, restore, stuck, "pg_wal/RECOVERYXLOG")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == (await read_wal(stack.agent.settings))[stuck][0]


async def test_the_one_segment_that_cannot_be_stored_is_named_and_how_long_it_waits(
    make_stack: MakeStack, s3_server: SeaweedServer, s3_environment: dict[str, str], pitr: RunPitr
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        stack = await asyncio.to_thread(make_stack, repository={**s3_environment, "AWS_ENDPOINT": proxy.endpoint})
        await asyncio.to_thread(finish_archiving, stack)
        blocked = stack.cluster.value("SELECT pg_walfile_name(pg_current_wal_lsn())")
        proxy.add(Fault("PUT", blocked, times=1_000_000, status=403, code="AccessDenied"))
        switched = []
        for number in range(3):
            await asyncio.to_thread(stack.cluster.execute, f"CREATE TABLE t{number} ()")
            switched.append(await asyncio.to_thread(stack.cluster.switch_wal))
        assert switched[0] == blocked
        since = stack.cluster.data_directory / "pg_wal" / "archive_status" / f"{blocked}.ready"
        os.utime(since, (1, 1))  # for long

        def told() -> str:
            said = pitr("status", "--json", settings=stack.agent.settings)
            findings = {finding["alert"]: finding["text"] for finding in json.loads(said.stdout)["findings"]}
            return str(findings.get("PitrArchiveBacklogOld", ""))

        await asyncio.to_thread(wait_until, lambda: blocked in told(), seconds=60, what="the file to be named")
        assert stack.agent.metric("pitr_archive_backlog_age_seconds") > 1e9
        assert stack.cluster.value("SELECT last_failed_wal FROM pg_stat_archiver") == blocked

        proxy.clear()
        await asyncio.to_thread(stack.cluster.wait_until_archived, switched[-1])
        await asyncio.to_thread(wait_until, lambda: not told(), seconds=60, what="the alarm to end")
        assert set(switched) <= (await read_wal(stack.agent.settings)).keys()


async def test_a_base_backup_whose_history_file_cannot_be_stored_fails_in_time_and_names_it(
    make_stack: MakeStack, s3_server: SeaweedServer, s3_environment: dict[str, str], pitr: RunPitr
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        repository = {**s3_environment, "AWS_ENDPOINT": proxy.endpoint}
        stack = await asyncio.to_thread(make_stack, repository=repository, settings={"PITR_BACKUP_WAL_TIMEOUT": "2"})
        proxy.add(Fault("PUT", r"\.backup\b", times=1_000_000, status=403, code="AccessDenied"))
        failed = await asyncio.to_thread(pitr, "backup", "now", settings=stack.agent.settings)
        assert failed.returncode == BackupFailed.exit_code
        assert re.search(r"WAL files that the base backup needs are not archived after 2 s", failed.stderr)
        assert re.search(r"cannot store .*[0-9A-F]{24}\.[0-9A-F]{8}\.backup\.zst", stack.agent.log_text())

        proxy.clear()
        await asyncio.to_thread(finish_archiving, stack)
        taken = await asyncio.to_thread(pitr, "backup", "now", settings=stack.agent.settings)
        assert taken.returncode == 0, taken.stderr


async def test_a_name_that_is_archived_with_other_content_is_refused(stack: Stack) -> None:
    segment = await asyncio.to_thread(finish_archiving, stack)
    path = stack.cluster.data_directory / "pg_wal" / segment
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    archive = str(stack.hooks / "wal-archive.sh")
    done = await asyncio.to_thread(hook, stack, archive, f"pg_wal/{segment}", segment)
    assert done.returncode == 1
    assert "already archived with other content" in done.stderr
    assert str(stack.cluster.value("SELECT system_identifier FROM pg_control_system()")) in done.stderr
    content[-1] ^= 1
    path.write_bytes(content)
    done = await asyncio.to_thread(hook, stack, archive, f"pg_wal/{segment}", segment)
    assert done.returncode == 0, done.stderr
    assert (await read_wal(stack.agent.settings))[segment] == [bytes(content)]


async def test_wal_of_another_database_cluster_never_enters_the_repository(stack: Stack, make_stack: MakeStack) -> None:
    await asyncio.to_thread(finish_archiving, stack)
    held = await read_wal(stack.agent.settings)
    foreign = make_stack(name="other", repository=stack.repository)
    segment = foreign.cluster.switch_wal()
    done = await asyncio.to_thread(hook, foreign, str(foreign.hooks / "wal-archive.sh"), f"pg_wal/{segment}", segment)
    assert done.returncode == 1
    assert "belongs to database cluster" in done.stderr
    assert await read_wal(stack.agent.settings) == held


async def test_an_agent_beside_a_copy_of_the_data_directory_does_not_answer_for_the_files_of_the_other(
    stack: Stack, make_agent: MakeAgent, lab_directory: Path
) -> None:
    """Same database cluster, same names: only the file itself tells that the agent has the wrong volume."""
    await asyncio.to_thread(finish_archiving, stack)
    stack.agent.kill()
    segment = stack.cluster.switch_wal()
    copy = lab_directory / "copy"
    shutil.copytree(stack.cluster.data_directory, copy, symlinks=True)
    theirs = copy / "pg_wal" / segment
    theirs.write_bytes(theirs.read_bytes())  # what the copy's own server would have written
    hand_over(copy)
    agent = make_agent({**stack.repository, **stack.cluster.client_environment, "PGDATA": str(copy)}, name="misplaced")
    await asyncio.to_thread(agent.start)
    arguments = str(stack.hooks / "wal-archive.sh"), f"pg_wal/{segment}", segment, "--socket", str(agent.socket)
    done = await asyncio.to_thread(hook, stack, *arguments)
    assert done.returncode == 1
    assert f'WAL file "{segment}" of {copy} is not the one handed over' in done.stderr
    assert segment not in await read_wal(stack.agent.settings)
    await asyncio.to_thread(stack.agent.start)
    await asyncio.to_thread(stack.cluster.wait_until_archived, segment)


async def test_a_stopped_agent_answers_what_is_under_way_and_leaves_nothing_behind(stack: Stack) -> None:
    await asyncio.to_thread(finish_archiving, stack)
    stack.agent.signal(signal.SIGTERM)
    assert await asyncio.to_thread(stack.agent.wait) == 0
    assert not stack.agent.socket.exists()
    assert [line["event"] for line in stack.agent.log_lines()][-1] == "agent stopped"


async def test_wal_that_postgresql_does_not_ask_for_is_not_uploaded_and_shows_as_backlog(stack: Stack) -> None:
    stack.cluster.execute("ALTER SYSTEM SET archive_command = ''", "SELECT pg_reload_conf()")
    stack.agent.kill()
    segment = stack.cluster.switch_wal()
    await asyncio.to_thread(stack.agent.start)
    await asyncio.to_thread(
        wait_until,
        lambda: stack.agent.metric("pitr_archive_backlog_files") >= 1,
        seconds=60,
        what="the backlog to show",
    )
    assert segment not in await read_wal(stack.agent.settings)


async def test_an_agent_that_is_stopped_gives_its_backup_up_and_leaves_nothing_of_it(stack: Stack) -> None:
    # The base backup waits for its WAL, which is not archived.
    stack.cluster.execute("ALTER SYSTEM SET archive_command = 'exit 1'", "SELECT pg_reload_conf()")
    backup = asyncio.create_task(asyncio.to_thread(run_pitr, "backup", "now", settings=stack.agent.settings))
    await asyncio.to_thread(
        wait_until,
        lambda: any(line["event"] == "base backup started" for line in stack.agent.log_lines()),
        seconds=60,
        what="the base backup to begin",
    )
    stack.agent.stop()
    done = await backup
    assert done.returncode == 50, done
    assert "the agent is stopping" in done.stderr
    assert not [key for key in await read_keys(stack.agent.settings) if key.startswith("basebackups_005/")]
    assert "Task exception was never retrieved" not in stack.agent.log_text()


async def test_an_archive_status_that_cannot_be_read_for_a_while_does_not_end_the_agent(stack: Stack) -> None:
    status = stack.cluster.data_directory / "pg_wal" / "archive_status"
    pid = stack.agent.pid

    def told() -> set[str]:
        return {line["event"] for line in stack.agent.log_lines() if f"{status} cannot be read" in str(line)}

    away = status.rename(status.with_name("away"))
    status.symlink_to(status)
    try:
        await asyncio.to_thread(
            wait_until,
            lambda: {"archive status not read", "wal continuity cannot be checked"} <= told(),
            seconds=60,
            what="the agent to tell what it cannot read",
        )
        await asyncio.sleep(SAMPLE_SECONDS + 1)  # whatever else looks there has looked
    finally:
        status.unlink()
        away.rename(status)
    await asyncio.to_thread(finish_archiving, stack)
    assert stack.agent.pid == pid


async def test_a_clone_archives_what_it_has_in_common_and_is_refused_once_it_differs(
    stack: Stack, make_agent: MakeAgent, lab_directory: Path
) -> None:
    """Two agents on one repository, both of the same database cluster, as after a volume snapshot."""
    first = stack.cluster
    await asyncio.to_thread(finish_archiving, stack)
    stack.agent.kill()
    first.execute("CREATE TABLE t (i int)")
    common = first.switch_wal()
    first.kill()
    second = PostgresCluster(lab_directory / "clone", first.binaries)
    shutil.copytree(first.data_directory, second.data_directory, symlinks=True)
    (second.data_directory / "postmaster.pid").unlink(missing_ok=True)
    hand_over(second.data_directory)
    agent = make_agent({**stack.repository, **second.client_environment}, name="clone-agent")
    second.environment["PITR_SOCKET"] = str(agent.socket)
    with second:
        for starting in (stack.agent.start, agent.start, first.start, second.start):
            await asyncio.to_thread(starting)
        for cluster in (first, second):
            await asyncio.to_thread(cluster.wait_until_archived, common)
        first.execute("INSERT INTO t VALUES (1)")
        ours = await asyncio.to_thread(finish_archiving, stack)
        second.execute("INSERT INTO t VALUES (2)")
        assert second.switch_wal() == ours
        await asyncio.to_thread(
            wait_until,
            lambda: "already archived with other content" in second.log_text(),
            seconds=60,
            what="the clone to be refused",
        )
        assert (second.data_directory / "pg_wal" / "archive_status" / f"{ours}.ready").exists()
        for _ in range(3):
            second.execute("INSERT INTO t VALUES (3)")
            ahead = second.switch_wal()
        refusals = second.log_text().count("already archived with other content")
        await asyncio.to_thread(
            wait_until,
            lambda: second.log_text().count("already archived with other content") > refusals + 3,
            seconds=150,
            what="the clone to be refused again, with more WAL at hand",
        )
        while first.switch_wal() != ahead:
            first.execute("INSERT INTO t VALUES (4)")
        await asyncio.to_thread(finish_archiving, stack)
        assert "already archived with other content" not in first.log_text()
    assert (await read_wal(stack.agent.settings))[ours] == [(first.data_directory / "pg_wal" / ours).read_bytes()]
