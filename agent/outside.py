"""The repository and what belongs to it, opened from the settings: for every command, and for the agent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from agent.ports import Clock, ObjectStore
from agent.repository.object_format import ObjectFormat
from agent.repository.wal_archive import WalArchive
from agent.settings import Settings
from agent.storage.clock import SystemClock
from agent.storage.connect import open_store
from agent.storage.health import StoreHealth
from agent.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Outside:
    """The adapters that every command needs, opened from the settings."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    store: ObjectStore
    objects: ObjectFormat
    archive: WalArchive
    health: StoreHealth


@asynccontextmanager
async def outside(settings: Settings, *, retry_seconds: float | None = None) -> AsyncIterator[Outside]:
    """Open the repository and what belongs to it; close it on leaving the context.

    Failing requests are retried for `retry_seconds`, by default as long as the settings say.
    """
    clock, metrics = SystemClock(), Metrics(CollectorRegistry())
    health = StoreHealth(clock)
    store = await open_store(settings, metrics, clock, retry_seconds=retry_seconds, health=health)
    objects = ObjectFormat(settings.compression, settings.libsodium_key)
    archive = WalArchive(store, objects, digest_is_kept=settings.s3 is not None)  # a directory keeps no metadata
    try:
        yield Outside(settings, clock, metrics, store, objects, archive, health)
    finally:
        await store.close()
