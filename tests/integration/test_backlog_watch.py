"""What the volume tells of the WAL that piles up on it, and when it is said."""

import asyncio
import shutil
from collections.abc import Callable

import pytest
import structlog
from prometheus_client import CollectorRegistry

from agent.archive.backlog_watch import BacklogWatch
from agent.domain.wal import segment_name
from agent.postgres.data_directory import DataDirectory
from agent.storage.clock import SystemClock
from agent.telemetry.metrics import Metrics
from tests.support.postgres import MakeCluster

SEGMENT_BYTES = 16 << 20


class Story(SystemClock):
    """A clock on which sleeping takes no time, but each sleep is the next step of a story; the last one cancels."""

    def __init__(self, steps: int, happen: Callable[[int], None]) -> None:
        self._steps, self._happen, self._step = steps, happen, 0

    def monotonic(self) -> float:
        return 5.0 * self._step

    async def sleep(self, seconds: float) -> None:
        self._step += 1
        if self._step > self._steps:
            raise asyncio.CancelledError
        self._happen(self._step)


async def test_an_outage_that_fills_the_volume_is_told_once_and_its_end_once(make_cluster: MakeCluster) -> None:
    cluster, metrics = make_cluster(segment_megabytes=16), Metrics(CollectorRegistry())
    status = cluster.data_directory / "pg_wal" / "archive_status"
    free = shutil.disk_usage(status).free
    # So much a step of 5 seconds that about an hour of it fills the volume; names are enough.
    a_step = max(1, free // SEGMENT_BYTES // 720)
    rate = a_step * SEGMENT_BYTES / 5

    def happen(step: int) -> None:
        if step <= 40:
            for number in range(step * a_step, (step + 1) * a_step):
                (status / f"{segment_name(1, number * SEGMENT_BYTES, SEGMENT_BYTES)}.ready").touch()
        elif step == 41:
            for path in status.glob("*.ready"):
                path.rename(path.with_suffix(".done"))

    watch = BacklogWatch(lambda: 0, DataDirectory(cluster.data_directory), Story(120, happen), metrics)
    with structlog.testing.capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        await watch.run()
    assert [line["event"] for line in lines] == ["wal volume fills up", "wal volume has room again"]
    assert lines[0]["seconds_until_full"] == pytest.approx(free / rate, rel=0.5)  # others use the disk, too
    assert lines[0]["written_bytes_per_second"] == pytest.approx(rate, rel=0.1)
    assert metrics.registry.get_sample_value("pitr_wal_volume_seconds_until_full") == float("inf")
    assert metrics.registry.get_sample_value("pitr_wal_volume_free_bytes") == pytest.approx(free, rel=0.5)
    assert metrics.registry.get_sample_value("pitr_wal_written_bytes_per_second") == 0


async def test_a_volume_without_a_data_directory_is_waited_for(make_cluster: MakeCluster) -> None:
    metrics = Metrics(CollectorRegistry())
    watch = BacklogWatch(lambda: 0, DataDirectory(make_cluster().data_directory / "absent"), Story(3, print), metrics)
    with pytest.raises(asyncio.CancelledError):
        await watch.run()
    assert metrics.registry.get_sample_value("pitr_wal_volume_seconds_until_full") == float("inf")
