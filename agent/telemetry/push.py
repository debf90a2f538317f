"""What a restore or a drill tells a Pushgateway when it ends: a Job is gone before anybody scrapes it."""

import asyncio
import http.client
import threading
from collections.abc import Mapping

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import push_to_gateway, pushadd_to_gateway

PUSH_SECONDS = 10.0

RESTORE_METRICS: Mapping[str, str] = {
    "pitr_restore_success": "1 if the last restore succeeded, else 0",
    "pitr_restore_exit_code": "What it ended with: 0, or the code of its error",
    "pitr_restore_finished_timestamp_seconds": "When it ended",
    "pitr_restore_restored_to_timestamp_seconds": "Time of the last transaction that it replayed",
    "pitr_restore_timeline": "The timeline that its promotion began",
    "pitr_restore_duration_seconds": "How long it took, its stages together",
    "pitr_restore_stage_seconds": "How long each of its stages took",
    "pitr_restore_base_backup_bytes": "Size of what its base backups restored",
    "pitr_restore_wal_bytes": "How much WAL it replayed",
}
DRILL_METRICS: Mapping[str, str] = {
    "pitr_drill_last_success_timestamp_seconds": "When a restore drill last succeeded",
    "pitr_drill_last_failure_timestamp_seconds": "When a restore drill last failed",
    "pitr_drill_duration_seconds": "How long the last successful drill took to restore: the recovery time to expect",
    "pitr_drill_moment_timestamp_seconds": "The moment that the last successful drill restored",
    "pitr_drill_stage_seconds": "How long each stage of the last successful drill took",
}

log = structlog.get_logger()

Values = Mapping[str, float | Mapping[str, float] | None]
"""Metrics by name; one with a value for each stage has a mapping, one that is not known None."""


def registry_of(values: Values) -> CollectorRegistry:
    """Return a registry of exactly the metrics that have a value."""
    registry = CollectorRegistry()
    for name, value in values.items():
        text = {**RESTORE_METRICS, **DRILL_METRICS}[name]
        if isinstance(value, Mapping):
            gauge = Gauge(name, text, ["stage"], registry=registry)
            for stage, seconds in value.items():
                gauge.labels(stage).set(seconds)
        elif value is not None:
            Gauge(name, text, registry=registry).set(value)
    return registry


async def push(
    gateway: str, job: str, repository: str, values: Values, *, keep_others: bool, seconds: float = PUSH_SECONDS
) -> None:
    """Push `values` to the Pushgateway; one that is away, refuses or hangs costs `seconds` and a warning, no more.

    Args:
        gateway: Its URL.
        job, repository: What the values are grouped by.
        values: The metrics.
        keep_others: Leave the group's other metrics as they are, instead of removing them.
        seconds: How long to wait.
    """
    send = pushadd_to_gateway if keep_others else push_to_gateway
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def work() -> None:
        try:
            send(gateway, job, registry_of(values), {"repository": repository}, timeout=seconds)
        except (OSError, ValueError, http.client.HTTPException) as error:
            log.warning("metrics not pushed", pushgateway=gateway, reason=str(error))
        finally:
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # too late: nobody waits any more
                log.debug("metrics pushed late")

    # Not of the loop's pool, which is waited for at the end: a gateway that trickles would hold the process.
    threading.Thread(target=work, name="push metrics", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        log.warning("metrics not pushed", pushgateway=gateway, reason=f"no answer within {seconds:g} s")
