"""WAL of every `wal_segment_size` goes out and comes back through the hooks, also where its names roll over."""

import asyncio
from pathlib import Path

import pytest

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from tests.support.stack import MakeStack, Stack

ROWS = "SELECT array_agg(i ORDER BY i) FROM t"
# One MiB of noise so many times: no compressor makes it smaller.
NOISE = """
    SELECT pg_logical_emit_message(true, 'noise', (
        SELECT string_agg(decode(md5(i::text || random()::text), 'hex'), '') FROM generate_series(1, 65536) i
    )) FROM generate_series(1, {megabytes})
"""


def commit_and_switch(stack: Stack, row: int, noise_megabytes: int) -> str:
    """Commit a row and some noise; return the segment they end in, once it is archived."""
    stack.cluster.execute(f"INSERT INTO t VALUES ({row})")
    if noise_megabytes:
        stack.cluster.execute(NOISE.format(megabytes=noise_megabytes))
    segment = stack.cluster.switch_wal()
    stack.cluster.wait_until_archived(segment)
    return segment


@pytest.mark.parametrize(
    ("segment_megabytes", "last_of_log", "noise_megabytes"), [(1, "00000FFF", 0), (64, "0000003F", 20)]
)
async def test_wal_crosses_the_end_of_a_log_out_and_back(
    make_stack: MakeStack, s3_environment: dict[str, str], lab_directory: Path,
    segment_megabytes: int, last_of_log: str, noise_megabytes: int,
) -> None:  # fmt: skip
    last = "0000000100000000" + last_of_log
    first = f"{int(last, 16) - 2:024X}"
    stack = await asyncio.to_thread(
        lambda: make_stack(repository=s3_environment, segment_megabytes=segment_megabytes, first_segment=first)
    )
    stack.cluster.execute("CREATE TABLE t AS SELECT 1 AS i")
    taken = await asyncio.to_thread(run_pitr, "backup", "now", settings=stack.agent.settings)
    assert taken.returncode == 0, taken.stderr
    archived = [await asyncio.to_thread(commit_and_switch, stack, row, noise_megabytes) for row in (2, 3, 4)]
    assert archived[0] <= last < "000000010000000100000000" <= archived[-1]
    uploads = [line for line in stack.agent.log_lines() if line["event"] == "wal archived"]
    assert max(line["stored_bytes"] for line in uploads) > noise_megabytes << 20

    directory = lab_directory / "restored"
    settings = {
        **s3_environment,
        "PGDATA": str(directory),
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries["postgres"].parent),
        "AUTO_START": "true",
    }
    done = await asyncio.to_thread(lambda: run_pitr("restore", settings=settings))
    assert done.returncode == 0, done.stderr
    with PostgresCluster(directory, stack.cluster.binaries) as restored:
        await asyncio.to_thread(restored.start)
        assert restored.value(ROWS) == [1, 2, 3, 4]
        assert restored.value("SHOW wal_segment_size") == f"{segment_megabytes}MB"
