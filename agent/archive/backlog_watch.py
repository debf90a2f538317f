"""Watches how fast WAL piles up on the volume. Needs no database session: the volume says it all."""

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from agent.domain.control_file import ClusterState
from agent.domain.wal import segment_position
from agent.domain.wal_rates import WalSample, WalTrend, is_bad, wal_trend
from agent.errors import ConfigError
from agent.ports import Clock
from agent.postgres.data_directory import ArchiveStatus, DataDirectory
from agent.telemetry.metrics import Metrics

SAMPLE_SECONDS = 5.0
WINDOW_SECONDS = 300.0

log = structlog.get_logger()


class BacklogWatch:
    """Measures WAL written, archived and kept, and when the volume will be full. Run it as a service.

    `archived_bytes` tells how much the agent has archived since it began. trend, free_bytes,
    is_primary: as last seen, None before.
    """

    name = "backlog watch"

    def __init__(
        self, archived_bytes: Callable[[], int], data_directory: DataDirectory, clock: Clock, metrics: Metrics
    ) -> None:
        self._archived_bytes = archived_bytes
        self._data_directory = data_directory
        self._clock = clock
        self._metrics = metrics
        self._samples: deque[WalSample] = deque()
        self._is_bad = False
        self.trend: WalTrend | None = None
        self.free_bytes: int | None = None
        self.is_primary: bool | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                sample, free_bytes = await asyncio.to_thread(self._measure)
            except ConfigError:  # no data directory yet; whoever needs it says so
                self._samples.clear()
            else:
                self._take_up(sample, free_bytes)
            await self._clock.sleep(SAMPLE_SECONDS)

    def _measure(self) -> tuple[WalSample, int]:
        control = self._data_directory.control_file()
        self.is_primary = control.state is ClusterState.IN_PRODUCTION
        status = self._data_directory.archive_status()
        segment_bytes = control.wal_segment_bytes
        segments_ready = sum(segment_position(name, segment_bytes) is not None for name in status.ready)
        written = max(control.checkpoint_lsn, _end_of_newest(status, segment_bytes))
        if self._samples:  # what shows how far it was may have been recycled
            written = max(written, self._samples[-1].written_bytes)
        sample = WalSample(
            seconds=self._clock.monotonic(),
            written_bytes=written,
            archived_bytes=self._archived_bytes(),
            kept_bytes=segments_ready * segment_bytes,
        )
        return sample, self._data_directory.wal_volume_free_bytes()

    def _take_up(self, sample: WalSample, free_bytes: int) -> None:
        self._samples.append(sample)
        while sample.seconds - self._samples[0].seconds > WINDOW_SECONDS:
            self._samples.popleft()
        self._metrics.wal_volume_free_bytes.set(free_bytes)
        self.free_bytes = free_bytes
        self.trend = trend = wal_trend(self._samples, free_bytes)
        if trend is not None:
            self._publish(trend)
            self._tell(trend, sample.kept_bytes, free_bytes)

    def _publish(self, trend: WalTrend) -> None:
        self._metrics.wal_written_rate.set(trend.written_rate)
        self._metrics.wal_archived_rate.set(trend.archived_rate)
        until_full = trend.seconds_until_full
        self._metrics.wal_volume_full_seconds.set(float("inf") if until_full is None else until_full)

    def _tell(self, trend: WalTrend, kept_bytes: int, free_bytes: int) -> None:
        was_bad, self._is_bad = self._is_bad, is_bad(trend, was_bad=self._is_bad)
        if was_bad is self._is_bad:
            return
        tell, event = (log.warning, "wal volume fills up") if self._is_bad else (log.info, "wal volume has room again")
        tell(
            event,
            seconds_until_full=None if trend.seconds_until_full is None else round(trend.seconds_until_full),
            free_bytes=free_bytes,
            kept_bytes=kept_bytes,
            written_bytes_per_second=round(trend.written_rate),
            archived_bytes_per_second=round(trend.archived_rate),
        )


def _end_of_newest(status: ArchiveStatus, segment_bytes: int) -> int:
    positions = [segment_position(name, segment_bytes) for name in status.ready | status.done]
    newest = max((position for position in positions if position is not None), default=None)
    return (newest[1] + 1) * segment_bytes if newest is not None else 0
