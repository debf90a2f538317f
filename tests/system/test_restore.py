"""A restore that is killed, repeated, misused or fed damaged WAL ends complete, or says why not; never in between."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lz4.frame
import psycopg
import pytest

from agent.domain.control_file import ClusterState
from agent.domain.server_checks import RECOVERY_SETTINGS_FILE
from agent.domain.wal import parse_segment_name
from agent.errors import PostgresError
from agent.lab.agent_process import agent_environment, pitr_command
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.processes import has_ended_in, kill_tree
from agent.lab.waiting import wait_until
from agent.postgres.data_directory import DataDirectory
from agent.restore.marker import MARKER_NAME
from agent.restore.parts_done import FOLDER
from agent.restore.recovery_settings import RECOVERY_SIGNAL
from tests.support.agent_process import MakeAgent, RunPitr
from tests.support.postgres import FindBinaries
from tests.support.small_volume import MIB, SmallVolume
from tests.support.walg_buckets import (
    RecoveryPoint,
    WalgBucket,
    answers,
    needs_walg_buckets,
    recovery_points,
    restore_settings,
)

pytestmark = needs_walg_buckets

BUCKET = WalgBucket("pg15-lz4-full")
MIDDLE = "000000010000000000000010"  # a segment between the base backup and both points
SECONDS = 60


def point(checkpoint: str) -> RecoveryPoint:
    target = {"end-of-wal": "", "after-drop": "TARGET_TIME"}[checkpoint]
    content = next(content for content in BUCKET.expected["checkpoints"] if content["id"] == checkpoint)
    return RecoveryPoint(BUCKET, checkpoint, target, content.get(target.lower(), ""))


@pytest.fixture
def settings(lab_directory: Path, hook_directory: Path, postgres_binaries: FindBinaries) -> dict[str, str]:
    """Settings that restore to `after-drop` in `lab_directory`/restored."""
    return restore_settings(point("after-drop"), lab_directory, hook_directory, postgres_binaries(BUCKET.major))


@pytest.fixture
def restored(lab_directory: Path, postgres_binaries: FindBinaries) -> Iterator[PostgresCluster]:
    """What is restored with `settings`."""
    with PostgresCluster(lab_directory / "restored", postgres_binaries(BUCKET.major)) as cluster:
        yield cluster


def marker_of(cluster: PostgresCluster) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads((cluster.data_directory / MARKER_NAME).read_text())
    return marker


def stage_of(cluster: PostgresCluster) -> str | None:
    return str(marker_of(cluster)["stage"]) if (cluster.data_directory / MARKER_NAME).exists() else None


def require_rows(cluster: PostgresCluster, checkpoint: str) -> None:
    """Start the restored server as anyone would; compare its rows."""
    cluster.start()
    assert answers(cluster, point(checkpoint)) == point(checkpoint).answers
    cluster.stop()


def is_open(cluster: PostgresCluster) -> bool:
    try:
        return cluster.value("SELECT NOT pg_is_in_recovery()") is True
    except psycopg.OperationalError:  # hot_standby is off: nobody is let in before the end
        return False


def events(said: str) -> list[str]:
    return [json.loads(line)["event"] for line in said.splitlines() if line.startswith("{")]


@contextmanager
def started(settings: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        pitr_command("restore"), env=agent_environment(settings), stdin=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            kill_tree(process)


def block_replay(settings: dict[str, str], lab_directory: Path, segment: str = MIDDLE) -> tuple[Path, Path]:
    """Make replay stop before `segment`: it says so by the first file returned and waits for the second."""
    hooks, come, go = (lab_directory / name for name in ("hooks", "come", "go"))
    hooks.mkdir()
    wait = f"if [ $1 = {segment} ]; then touch {come}; while [ ! -e {go} ]; do sleep 0.02; done; fi"
    script = hooks / "wal-restore.sh"
    script.write_text(f'#!/bin/sh\n{wait}\nexec {settings["PITR_HOOK_DIR"]}/wal-restore.sh "$@"\n')
    script.chmod(0o755)
    hand_over(hooks)
    settings["PITR_HOOK_DIR"] = str(hooks)
    return come, go


def test_restore_mode_tells_plan_stage_and_progress_on_its_http_port(
    settings: dict[str, str], make_agent: MakeAgent, lab_directory: Path
) -> None:
    come, go = block_replay(settings, lab_directory)
    del settings["PITR_SOCKET"]
    agent = make_agent({**settings, "PITR_MODE": "restore"})
    agent.start(wait=False)
    wait_until(come.exists, seconds=SECONDS, what="replay to reach the middle")

    def told() -> dict[str, Any]:
        status: dict[str, Any] = json.loads(agent.get("/status.json")[1])["restore"]
        return status

    wait_until(lambda: told()["done_bytes"] > 0, seconds=SECONDS, what="progress")
    status = told()
    assert (status["stage"], status["timeline"]) == ("replaying", 1)
    assert status["target"].startswith("time ")
    assert 0 < status["ratio"] < 1
    assert set(status["seconds"]) == {"planning", "hydrating"}
    assert "replaying" in agent.get("/")[1]
    assert agent.metric("pitr_restore_replayed_lsn") < agent.metric("pitr_restore_target_lsn")
    assert agent.metric('pitr_restore_stage{stage="replaying"}') == 1
    go.touch()
    assert agent.wait() == 0
    said = {line["event"]: line for line in agent.log_lines()}
    assert {"backup_fetch", "wal_fetch", "restore finished"} <= set(said)
    assert said["restore finished"]["wal_bytes"] > 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_restore_cut_short_in_replay_goes_on_without_downloading_the_backup_again(
    how: signal.Signals, settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr, lab_directory: Path
) -> None:
    come, go = block_replay(settings, lab_directory)
    with started(settings) as first:
        wait_until(come.exists, seconds=SECONDS, what="replay to reach the middle")
        first.send_signal(how)
        assert first.wait(SECONDS) == (51 if how is signal.SIGTERM else -how)
        wait_until(lambda: has_ended_in(lab_directory / "restored"), seconds=SECONDS, what="PostgreSQL to end")
    assert stage_of(restored) == "replaying"
    with pytest.raises(PostgresError, match="this restore was cut short, run pitr restore again"):
        restored.start()
    go.touch()
    shutil.rmtree(lab_directory / "bucket" / "basebackups_005" / marker_of(restored)["backup"])
    second = pitr("restore", settings=settings)
    assert second.returncode == 0, second.stderr
    assert stage_of(restored) == "promoted"
    assert "backup_fetch" not in events(second.stderr)
    require_rows(restored, "after-drop")


def test_a_restore_killed_while_it_hydrates_is_completed_by_the_next(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    with started(settings) as first:
        wait_until(lambda: stage_of(restored) is not None, seconds=SECONDS, what="the marker")
        first.kill()
    wait_until(lambda: has_ended_in(restored.data_directory), seconds=SECONDS, what="PostgreSQL to end")
    second = pitr("restore", settings=settings)
    assert second.returncode == 0, second.stderr
    require_rows(restored, "after-drop")


def test_a_finished_restore_is_done_once(settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr) -> None:
    assert pitr("restore", settings=settings).returncode == 0
    restored.start()
    restored.execute("CREATE TABLE written_since (x int)")
    restored.stop()
    for start in range(20):  # of a pod whose init container restores
        again = pitr("restore", settings=settings)
        assert again.returncode == 0, again.stderr
        restored.start()
        assert restored.value("SELECT count(*) FROM written_since") == start
        restored.execute("INSERT INTO written_since VALUES (1)")
        restored.kill()
    other = pitr("restore", settings={**settings, "TARGET_TIME": "2026-11-22T20:38:25.403165Z"})
    assert other.returncode == 10
    assert "holds another restore (promoted): its target was" in other.stderr
    restored.start()
    assert restored.value("SELECT count(*) FROM written_since") == 20


def test_a_directory_that_holds_anything_else_is_refused(settings: dict[str, str], pitr: RunPitr) -> None:
    data_directory = Path(settings["PGDATA"])
    data_directory.mkdir()
    (data_directory / "precious").touch()
    hand_over(data_directory)
    done = pitr("restore", settings=settings)
    assert done.returncode == 10
    assert str(data_directory) in done.stderr
    assert [path.name for path in data_directory.iterdir()] == ["precious"]


def test_without_auto_start_a_server_recovers_beside_an_agent(
    settings: dict[str, str],
    restored: PostgresCluster,
    pitr: RunPitr,
    make_agent: MakeAgent,
    postgres_binaries: FindBinaries,
) -> None:
    hydrated = pitr("restore", settings={**settings, "AUTO_START": "false"})
    assert hydrated.returncode == 0, hydrated.stderr
    assert stage_of(restored) == "hydrated"
    agent = make_agent({name: settings[name] for name in ("WALG_FILE_PREFIX", "PGDATA")})
    agent.start()
    binaries, environment = postgres_binaries(BUCKET.major), {"PITR_SOCKET": str(agent.socket)}
    with PostgresCluster(restored.data_directory, binaries, environment=environment) as cluster:
        cluster.start()
        wait_until(lambda: is_open(cluster), seconds=SECONDS, what="recovery to end")
        assert cluster.value("SHOW archive_mode") == "off"
        while_it_runs = pitr("restore", settings=settings)
        cluster.stop("immediate")
        crashed = pitr("restore", settings=settings)
        cluster.start()
        cluster.stop()
    assert (while_it_runs.returncode, crashed.returncode) == (10, 10)
    assert "a server runs in" in while_it_runs.stderr
    assert "another server promoted" in crashed.stderr
    assert stage_of(restored) == "hydrated"
    assert not (restored.data_directory / RECOVERY_SETTINGS_FILE).exists()
    agent.stop()
    again = pitr("restore", settings=settings)
    assert again.returncode == 0, again.stderr
    assert "promotion by another server found" in events(again.stderr)
    require_rows(restored, "after-drop")


def test_a_hydrated_directory_is_run_through_promotion_by_a_later_run(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    assert pitr("restore", settings={**settings, "AUTO_START": "false"}).returncode == 0
    assert pitr("restore", settings={**settings, "AUTO_START": "false"}).returncode == 0
    assert (restored.data_directory / RECOVERY_SIGNAL).exists()
    done = pitr("restore", settings=settings)
    assert done.returncode == 0, done.stderr
    assert DataDirectory(restored.data_directory).control_file().state is ClusterState.SHUT_DOWN
    require_rows(restored, "after-drop")


def test_a_promotion_that_was_cut_short_is_not_started_again(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    assert pitr("restore", settings={**settings, "AUTO_START": "false"}).returncode == 0
    (restored.data_directory / RECOVERY_SIGNAL).unlink()
    for _ in range(2):
        done = pitr("restore", settings=settings)
        assert done.returncode == 51
        assert "the promotion was cut short" in done.stderr
        assert "Empty the directory" in done.stderr
        assert stage_of(restored) == "failed"
        assert not (restored.data_directory / "global" / "pg_control").exists()


def test_a_replay_that_fell_short_is_found_by_the_run_after_one_that_was_killed_before_it_told(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr, lab_directory: Path
) -> None:
    del settings["TARGET_TIME"]
    real, stopped = Path(settings["PITR_POSTGRES_BIN"]) / "postgres", lab_directory / "stopped"
    programs = lab_directory / "programs"
    programs.mkdir()
    (programs / "wal-restore.sh").write_text(
        f'#!/bin/sh\n[ $1 = {MIDDLE} ] && exit 1\nexec {settings["PITR_HOOK_DIR"]}/wal-restore.sh "$@"\n'
    )
    (programs / "postgres").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\n{real} "$@" &\n'
        f'trap "kill -INT $!" INT\nwait $!\nwait $!\ntouch {stopped}\nexec sleep 60\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    hand_over(programs)
    settings["PITR_HOOK_DIR"] = str(programs)
    with started({**settings, "PITR_POSTGRES_BIN": str(programs)}) as first:
        wait_until(stopped.exists, seconds=SECONDS, what="the promoted server to stop")
        first.kill()
    assert stage_of(restored) == "replaying"
    second = pitr("restore", settings=settings)
    assert second.returncode == 51, second.stderr
    assert "a segment before that is damaged, or was not delivered" in second.stderr
    assert stage_of(restored) == "failed"


def test_a_directory_whose_label_was_removed_does_not_start(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    assert pitr("restore", settings={**settings, "AUTO_START": "false"}).returncode == 0
    (restored.data_directory / "backup_label").unlink()
    done = pitr("restore", settings=settings)
    assert done.returncode == 51
    assert "could not locate a valid checkpoint record" in done.stderr
    assert "Never remove backup_label" in done.stderr


def test_damaged_wal_in_the_middle_is_never_taken_for_the_end(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr, lab_directory: Path
) -> None:
    del settings["TARGET_TIME"]
    damaged = lab_directory / "bucket" / "wal_005" / f"{MIDDLE}.lz4"
    content = bytearray(lz4.frame.decompress(damaged.read_bytes()))
    content[20_000] ^= 1  # within a record; behind the records a segment holds zeros
    damaged.write_bytes(lz4.frame.compress(bytes(content)))
    os.utime(damaged, ns=(0, 0))
    for _ in range(2):
        done = pitr("restore", settings=settings)
        assert done.returncode not in (0, 1), "neither restored nor a bug"
        assert "damaged" in done.stderr
    assert stage_of(restored) != "promoted"


def test_the_hook_and_the_server_must_be_there_before_anything_is_downloaded(
    settings: dict[str, str], pitr: RunPitr, tmp_path: Path, postgres_binaries: FindBinaries
) -> None:
    for name, value, told in (
        ("PITR_HOOK_DIR", tmp_path, "PITR_HOOK_DIR"),
        ("PITR_POSTGRES_BIN", tmp_path, "the base backup is of PostgreSQL 15"),
        ("PITR_POSTGRES_BIN", postgres_binaries(13).directory, "PostgreSQL 13 in"),
    ):
        done = pitr("restore", settings={**settings, name: str(value)})
        assert done.returncode == 10, done.stderr
        assert told in done.stderr
        assert list(Path(settings["PGDATA"]).iterdir()) == []


def parts_done(settings: dict[str, str]) -> list[str]:
    """Return the keys of the tars that the restore has recorded as done."""
    folder = Path(settings["PGDATA"]) / FOLDER
    tars = Path(settings["WALG_FILE_PREFIX"]).glob("basebackups_005/*/tar_partitions/part*")
    keys = [str(tar.relative_to(settings["WALG_FILE_PREFIX"])) for tar in tars]
    return [key for key in keys if (folder / key.replace("/", "_")).exists()]


def replace_content(path: Path, content: bytes) -> None:
    """Put other content of the same size into an object, so that a listing shows nothing of it."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_restore_killed_again_and_again_reads_no_tar_twice_and_ends_the_same(
    lab_directory: Path, hook_directory: Path, postgres_binaries: FindBinaries, pitr: RunPitr
) -> None:
    chosen = random.choice(recovery_points("pg17-zstd-delta", reachable=True, every_target=False)[-2:])
    binaries = postgres_binaries(chosen.bucket.major)
    settings = restore_settings(chosen, lab_directory, hook_directory, binaries)
    settings["WALG_DOWNLOAD_CONCURRENCY"] = "1"
    wanted, bucket, data_directory = 0, Path(settings["WALG_FILE_PREFIX"]), Path(settings["PGDATA"])
    plan = json.loads(pitr("restore", "--plan", "--json", settings={**settings, "PGDATA": ""}).stdout)
    segments = sorted(path.name[:24] for path in (bucket / "wal_005").iterdir() if path.name[24:25] == ".")
    middle = random.choice([name for name in segments if plan["wal"]["first"] < name <= plan["wal"]["last"]])
    come, go = block_replay(settings, lab_directory, middle)
    while wanted < 6:
        wanted += random.randint(1, 4)
        with started(settings) as process:
            enough = partial(has_come_to, wanted, process, settings)
            wait_until(enough, seconds=SECONDS, what="tars to be done")
            process.kill()
        for key in parts_done(settings):
            replace_content(bucket / key, bytes((bucket / key).stat().st_size))  # whoever reads it fails
    # Killed after the last tar, it may have come as far as replay.
    wait_until(lambda: come.exists() or has_ended_in(data_directory), seconds=SECONDS, what="PostgreSQL to end")
    if not come.exists():
        with started(settings) as process:
            wait_until(come.exists, seconds=SECONDS, what="replay to come there")
            process.kill()
    go.touch()
    wait_until(lambda: has_ended_in(data_directory), seconds=SECONDS, what="PostgreSQL to end")
    replayed_for_good = DataDirectory(data_directory).control_file().redo_lsn
    done = pitr("restore", settings=settings)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    fetched = [line["wal_file"] for line in lines if line["event"] == "wal_fetch" and len(line["wal_file"]) == 24]
    segment_bytes = DataDirectory(data_directory).control_file().wal_segment_bytes
    assert min(parse_segment_name(name, segment_bytes)[1] for name in fetched) + segment_bytes > replayed_for_good
    with PostgresCluster(data_directory, binaries) as cluster:
        cluster.start()
        assert answers(cluster, chosen) == chosen.answers
        cluster.stop()


def has_come_to(wanted: int, process: "subprocess.Popen[bytes]", settings: dict[str, str]) -> bool:
    is_over = process.poll() is not None or is_hydrated(Path(settings["PGDATA"]))
    return is_over or len(parts_done(settings)) >= wanted


def is_hydrated(data_directory: Path) -> bool:
    return (data_directory / "global" / "pg_control").exists()


def test_what_another_request_left_half_restored_is_completed_for_a_new_one_that_may(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    (tar,) = (Path(settings["WALG_FILE_PREFIX"])).glob("basebackups_005/*/tar_partitions/part*")
    content = tar.read_bytes()
    replace_content(tar, bytes(len(content)))
    assert pitr("restore", settings=settings).returncode in (22, 23)
    assert stage_of(restored) == "hydrating"
    replace_content(tar, content)
    other = {**settings, "TARGET_TIME": ""}
    refused = pitr("restore", settings=other)
    assert refused.returncode == 10
    assert "holds another restore (hydrating): its target was" in refused.stderr
    done = pitr("restore", settings={**other, "PITR_RESTORE_DELTA": "true"})
    assert done.returncode == 0, done.stderr
    require_rows(restored, "end-of-wal")


def test_what_another_request_left_hydrated_but_not_marked_so_is_restored_over_and_not_taken_for_the_new_one(
    settings: dict[str, str], restored: PostgresCluster, pitr: RunPitr
) -> None:
    assert pitr("restore", settings={**settings, "AUTO_START": "false"}).returncode == 0
    marker = {**marker_of(restored), "stage": "hydrating"}  # killed after pg_control was in its place
    (restored.data_directory / MARKER_NAME).write_text(json.dumps(marker))
    done = pitr("restore", settings={**settings, "TARGET_TIME": "", "PITR_RESTORE_DELTA": "true"})
    assert done.returncode == 0, done.stderr
    require_rows(restored, "end-of-wal")


def test_a_full_volume_is_told_and_the_restore_goes_on_when_there_is_room(
    settings: dict[str, str], pitr: RunPitr, small_volume: SmallVolume
) -> None:
    small_volume.grow(400 * MIB)
    data_directory = small_volume.path / "restored"
    settings |= {"PGDATA": str(data_directory), "AUTO_START": "false"}
    (tar,) = (Path(settings["WALG_FILE_PREFIX"])).glob("basebackups_005/*/tar_partitions/part*")
    content = tar.read_bytes()
    replace_content(tar, bytes(len(content)))
    assert pitr("restore", settings=settings).returncode in (22, 23)
    replace_content(tar, content)
    small_volume.allow(300)
    few = pitr("restore", settings=settings)
    assert few.returncode == 10, few.stderr
    assert re.search(rf"{data_directory} can take 2\d\d more files, .*, but \S+ needs \d{{3,4}}\. Use", few.stderr)
    assert '"base backup is unpacked"' not in few.stderr
    small_volume.allow(100_000)
    small_volume.fill(leave=2 * MIB)
    full = pitr("restore", settings=settings)
    assert full.returncode == 51, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert "No space left on device. Enlarge the volume, or free space on it, then run the restore again" in last
    assert f"{data_directory}/" in last
    assert not is_hydrated(data_directory)
    small_volume.empty()
    done = pitr("restore", settings=settings)
    assert done.returncode == 0, done.stderr
    assert is_hydrated(data_directory)
