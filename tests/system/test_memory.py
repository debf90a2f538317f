"""The agent's memory under load, as the system counts it."""

import asyncio
import os
import random
import subprocess
from pathlib import Path

from agent.domain.wal import segment_name
from agent.lab.agent_process import AgentProcess
from agent.lab.privileges import hand_over, unprivileged
from tests.support.agent_process import MakeAgent
from tests.support.postgres import MakeCluster
from tests.support.repository import read_keys

MIB = 1 << 20
SEGMENT_BYTES, SEGMENTS, UPLOADS = 16 * MIB, 24, 64
LIMIT_BYTES = 64 * MIB
# What is not reserved: the threads' pieces and compressors, connections, what the C library keeps between two uses.
BESIDE_BYTES = 64 * MIB


def memory(agent: AgentProcess, field: str) -> int:
    lines = Path(f"/proc/{agent.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


async def test_a_backlog_that_cannot_be_compressed_is_archived_within_the_memory_limit(
    make_cluster: MakeCluster, make_agent: MakeAgent, hook_directory: Path, s3_environment: dict[str, str]
) -> None:
    cluster = make_cluster(segment_megabytes=16)
    pg_wal = cluster.data_directory / "pg_wal"
    (own,) = (path for path in pg_wal.iterdir() if len(path.name) == 24)
    header = bytearray(own.read_bytes()[:40])
    noise = random.Random(1).randbytes(SEGMENT_BYTES)
    names = [segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES) for number in range(100, 100 + SEGMENTS)]
    for number, name in enumerate(names, 100):
        header[8:16] = (number * SEGMENT_BYTES).to_bytes(8, "little")  # xlp_pageaddr
        (pg_wal / name).write_bytes(header + noise[len(header) :])
        (pg_wal / "archive_status" / f"{name}.ready").touch()
    hand_over(pg_wal)
    settings = {"PGDATA": str(cluster.data_directory), "WALG_UPLOAD_CONCURRENCY": str(UPLOADS)}
    agent = make_agent({**s3_environment, **settings, "PITR_MEMORY_LIMIT": f"{LIMIT_BYTES // MIB}MiB"})
    await asyncio.to_thread(agent.start)
    idle = memory(agent, "VmRSS")
    for name in names:
        await asyncio.to_thread(
            subprocess.run,
            unprivileged([str(hook_directory / "wal-archive.sh"), f"pg_wal/{name}", name]),
            cwd=cluster.data_directory,
            env={"PATH": os.environ["PATH"], "PITR_SOCKET": str(agent.socket)},
            check=True,
        )
    assert {f"wal_005/{name}.zst" for name in names} <= set(await read_keys(agent.settings))
    assert memory(agent, "VmHWM") - idle <= LIMIT_BYTES + BESIDE_BYTES
