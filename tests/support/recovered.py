"""Base backups of a `BackupLab` restored and recovered: hydrated by the agent's code, run by PostgreSQL itself."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.domain.page import PAGE_BYTES, wrong_pages
from agent.domain.restore_target import RestoreTarget
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import PostgresBinaries
from agent.lab.privileges import hand_over
from agent.lab.waiting import wait_until
from agent.postgres.data_files import relation_file_number
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.restore.hydrate import claim, finish, hydrate
from agent.restore.planner import plan_from_repository
from tests.support.base_backup import BackupLab
from tests.support.object_formats import ZSTD


async def hydrated(
    lab: BackupLab,
    name: str,
    directory: Path,
    *,
    objects: ObjectFormat = ZSTD,
    tablespaces: dict[str, str] | None = None,
) -> None:
    """Put the base backup `name` into the new `directory`, with the settings that recover it to the end of the WAL."""
    plan = await plan_from_repository(lab.store, WalArchive(lab.store, objects), RestoreTarget(), name)
    assert plan.backup.name == name
    await claim(directory)
    await hydrate(
        lab.store, objects, plan, directory, tablespace_map=tablespaces or {}, concurrency=2, report=lambda _: None
    )
    await finish(directory)
    (directory / "recovery.signal").touch()
    hand_over(directory)
    for place in (tablespaces or {}).values():
        hand_over(Path(place))


@contextmanager
def running(lab: BackupLab, directory: Path) -> Iterator[PostgresCluster]:
    """Run what `hydrated` made through recovery; yield the promoted server."""
    with PostgresCluster(directory, lab.cluster.binaries) as cluster:
        wal = lab.store.root / "wal_005"
        cluster.configure(restore_command=f"cp {wal}/%f %p", archive_mode="off")
        cluster.start()
        wait_until(lambda: not cluster.value("SELECT pg_is_in_recovery()"), seconds=60, what="promotion")
        yield cluster


def verified(program: Path, directory: Path, *options: str) -> str:
    """Return what pg_verifybackup of version 18 says of a directory whose WAL is elsewhere.

    It knows all manifests. Those of 17 name a system identifier, which it reads out of a pg_control of its own version.
    """
    foreign = ["--ignore=global/pg_control"] if (directory / "PG_VERSION").read_text().strip() == "17" else []
    done = subprocess.run(
        [program, "--no-parse-wal", *options, *foreign, directory], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def require_sound(programs: PostgresBinaries, cluster: PostgresCluster) -> None:
    """Raise unless pg_amcheck finds every index whole, with all rows of its table, and since version 14 every table."""
    tables = [] if cluster.binaries.major >= 14 else ["--index=*"]
    subprocess.run(
        [
            programs["pg_amcheck"], "--all", "--install-missing", "--heapallindexed", "--rootdescend", *tables,
            f"--host={cluster.socket_directory}", f"--port={cluster.port}", "--username=postgres",
        ],
        check=True,
    )  # fmt: skip


def pages_with_a_wrong_checksum(directory: Path) -> list[str]:
    """Return which pages of a stopped server's relation files have a wrong checksum: file and position."""
    wrong: list[str] = []
    for path in directory.rglob("*"):
        segment = relation_file_number(f"/{path.relative_to(directory)}")
        if segment is None or not path.is_file() or not (content := path.read_bytes()):
            continue
        assert len(content) % PAGE_BYTES == 0, path
        wrong += [f"{path} {position}" for position in wrong_pages(content, segment * 131072, (1 << 64) - 1)]
    return wrong
