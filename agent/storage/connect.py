"""The repository's store as the settings name it."""

from agent.errors import ConfigError
from agent.ports import Clock, ObjectStore
from agent.settings import Settings
from agent.storage.directory import DirectoryObjectStore
from agent.storage.health import StoreHealth
from agent.storage.metered import MeteredStore
from agent.storage.retrying import Retry, RetryingStore
from agent.telemetry.metrics import Metrics

_LEAST_SILENCE_SECONDS = 20.0


def silence_seconds(settings: Settings, retry_seconds: float | None) -> float:
    """Return after how many seconds without a word a request is given up: soon where a person waits for so long."""
    if retry_seconds is None:
        return settings.store_timeout
    return min(settings.store_timeout, max(retry_seconds, _LEAST_SILENCE_SECONDS))


async def open_store(
    settings: Settings,
    metrics: Metrics,
    clock: Clock,
    *,
    retry_seconds: float | None = None,
    health: StoreHealth | None = None,
) -> ObjectStore:
    """Return the store of the repository: every attempt measured, passing faults retried. The caller closes it.

    Nothing is asked of the store yet; `check` does.

    Args:
        settings: Name an S3 bucket, or a directory.
        metrics: Where attempts are counted.
        clock: Times the attempts and the waits between them.
        retry_seconds: How long a call is tried again, because a person waits; default `settings.request_timeout`.
        health: Told whether the store answers, and when its credentials expire.

    Raises:
        RepositoryRefused: The endpoint is unusable, or there are no credentials.
    """
    deadline_seconds = settings.request_timeout if retry_seconds is None else retry_seconds
    health = health or StoreHealth(clock)
    retry = Retry(clock, deadline_seconds, metrics.repository_failed_attempts.inc, health)
    store: ObjectStore
    if settings.s3 is not None:
        from agent.storage.s3 import S3ObjectStore  # half of what a command loads: not for a directory
        from agent.storage.s3_bucket import TimeLimits

        store = on_s3 = await S3ObjectStore.connect(
            settings.s3, retry, TimeLimits(silence=silence_seconds(settings, retry_seconds))
        )
        health.credentials_expire_at = on_s3.credentials_expire_at
    elif settings.file_prefix is not None:
        store = DirectoryObjectStore(settings.file_prefix)
    else:
        raise ConfigError("no repository is named", hint="Set WALG_S3_PREFIX or WALG_FILE_PREFIX.")
    return RetryingStore(MeteredStore(store, metrics, clock, health), retry)
