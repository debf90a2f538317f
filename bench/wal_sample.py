"""Real WAL segments to measure with, made once and kept."""

import itertools
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from agent.domain.wal import segment_name
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import embedded_binaries
from agent.lab.privileges import make_temporary_directory, unprivileged

_PAGE_ADDRESS_OFFSET, _SEGMENT_BYTES_OFFSET = 8, 32  # XLogLongPageHeaderData, xlog_internal.h
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


def large_segments(directory: Path, segments: Sequence[Path], segment_bytes: int, count: int) -> list[Path]:
    """Make `count` segments of `segment_bytes` in `directory`, with headers of that size and the records of `segments`.

    What is in them cannot be replayed; it compresses as real WAL does.
    """
    directory.mkdir()
    shutil.copy(segments[0].parent / "pg_control", directory)
    content, made = itertools.cycle(segments), []
    for number in range(1, count + 1):
        path = directory / segment_name(1, number * segment_bytes, segment_bytes)
        with path.open("wb") as file:
            while file.tell() < segment_bytes:
                file.write(next(content).read_bytes()[: segment_bytes - file.tell()])
            file.seek(_PAGE_ADDRESS_OFFSET)
            file.write((number * segment_bytes).to_bytes(8, "little"))
            file.seek(_SEGMENT_BYTES_OFFSET)
            file.write(segment_bytes.to_bytes(4, "little"))
        made.append(path)
    return made
