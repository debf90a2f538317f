"""Real WAL segments to measure with, made once and kept."""

import shutil
import subprocess
import time
from pathlib import Path

from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import embedded_binaries
from agent.lab.privileges import make_temporary_directory, unprivileged

_SCALE = 50
_CHECKPOINT_SECONDS = 25.0  # a busy, larger database checkpoints often: most of its WAL is full page images


def wal_sample(directory: Path, count: int) -> list[Path]:
    """Return `count` segments of 16 MiB, in order, as PostgreSQL 18 wrote them under pgbench (scale 50, 8 clients).

    They are kept in `directory`, beside the control file of their database cluster (`pg_control`).
    """
    segments = sorted(directory.glob("0*"))
    if len(segments) < count:
        shutil.rmtree(directory, ignore_errors=True)
        made = make_temporary_directory("pitr-wal-sample-")  # PostgreSQL may not be allowed where `directory` is
        try:
            _generate(made, count)
            shutil.copytree(made, directory)
        finally:
            shutil.rmtree(made)
        segments = sorted(directory.glob("0*"))
    return segments[:count]


def _generate(directory: Path, count: int) -> None:
    data = directory / "pgdata"
    with PostgresCluster(data, embedded_binaries()) as cluster:
        cluster.initdb()
        cluster.configure(
            archive_mode="on",
            archive_command=f"cp %p {directory}/.%f && mv {directory}/.%f {directory}/%f",
            max_wal_size="3GB",
            shared_buffers="1GB",
            synchronous_commit="off",
        )
        cluster.start()
        cluster.run("pgbench", "-i", "-q", "-s", str(_SCALE), "postgres", seconds=600)
        cluster.wait_until_archived(cluster.switch_wal())
        for path in directory.glob("0*"):
            path.unlink()
        load = subprocess.Popen(
            unprivileged([cluster.binaries["pgbench"], "-n", "-c", "8", "-j", "2", "-T", "3600", "postgres"]),
            env=cluster.client_environment,
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            checkpoint = time.monotonic()
            while len(list(directory.glob("0*"))) <= count:
                time.sleep(0.5)
                if time.monotonic() - checkpoint > _CHECKPOINT_SECONDS:
                    cluster.execute("CHECKPOINT")
                    checkpoint = time.monotonic()
        finally:
            load.terminate()
            load.wait()
        cluster.stop()
        shutil.copy(data / "global" / "pg_control", directory / "pg_control")
    shutil.rmtree(data)
