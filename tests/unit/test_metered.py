"""What the repository's metrics say."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryRefused, RepositoryUnavailable
from agent.ports import Body, ObjectInfo
from agent.storage.clock import SystemClock
from agent.storage.health import StoreHealth
from agent.storage.memory import MemoryObjectStore
from agent.storage.metered import MeteredStore
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import StoreStatus


class BrokenStore(MemoryObjectStore):
    """Raises `error` when it is asked to look something up."""

    error: BaseException = RepositoryUnavailable("away")

    async def head(self, key: str) -> ObjectInfo | None:
        raise self.error


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def requests(registry: CollectorRegistry, operation: str, result: str) -> float:
    labels = {"operation": operation, "result": result}
    return registry.get_sample_value("pitr_repository_requests_total", labels) or 0


async def chunks() -> AsyncIterator[Body]:
    yield b"12345"


async def test_requests_and_bytes_are_counted_by_what_came_of_them(registry: CollectorRegistry) -> None:
    store = MeteredStore(MemoryObjectStore(), Metrics(registry), SystemClock())
    await store.put_if_absent("key", b"123")
    await store.put_if_absent("key", b"123")
    await store.put("other", b"1")
    await store.put_stream("stream", chunks())
    await store.get("key")
    await store.get("absent")
    await store.head("absent")
    for key in ("stream", "absent"):
        async with store.open(key) as pieces:
            assert pieces is None or [piece async for piece in pieces] == [b"12345"]
    assert [info.key async for info in store.list("")] == ["key", "other", "stream"]
    assert [info.key async for info in store.list_folder("none/")] == []
    await store.delete(["key"])
    await store.check()
    counted = {
        ("put_if_absent", "ok"): 1, ("put_if_absent", "exists"): 1, ("put", "ok"): 1, ("put_stream", "ok"): 1,
        ("get", "ok"): 1, ("get", "absent"): 1, ("head", "absent"): 1, ("open", "ok"): 1, ("open", "absent"): 1,
        ("list", "ok"): 2, ("delete", "ok"): 1, ("check", "ok"): 1,
    }  # fmt: skip
    assert {labels: requests(registry, *labels) for labels in counted} == counted
    assert registry.get_sample_value("pitr_repository_bytes_total", {"direction": "sent"}) == 3 + 3 + 1 + 5
    assert registry.get_sample_value("pitr_repository_bytes_total", {"direction": "received"}) == 3 + 5
    assert registry.get_sample_value("pitr_repository_seconds_count", {"operation": "get"}) == 2


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (RepositoryUnavailable("x"), "unavailable"),
        (RepositoryRefused("x"), "refused"),
        (RepositoryCorrupt("x"), "corrupt"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
async def test_a_failure_is_counted_by_its_kind(
    registry: CollectorRegistry, error: RepositoryError, result: str
) -> None:
    broken = BrokenStore()
    broken.error = error
    with pytest.raises(type(error)):
        await MeteredStore(broken, Metrics(registry), SystemClock()).head("key")
    assert requests(registry, "head", result) == 1


async def test_the_store_fails_from_the_first_request_that_is_not_answered_until_one_is() -> None:
    clock = SystemClock()
    health, broken = StoreHealth(clock), BrokenStore()
    store = MeteredStore(broken, Metrics(CollectorRegistry()), clock, health)
    assert health.status(None) == StoreStatus(None, None, "", None, None)
    for broken.error in (RepositoryUnavailable("away"), RepositoryRefused("go away")):
        with pytest.raises(RepositoryError):
            await store.head("key")
    failing = health.status("of another cluster")
    assert (failing.answered_at, failing.reason, failing.foreign) == (None, "go away", "of another cluster")
    assert failing.failing_since is not None
    await store.get("absent")
    answered = health.status(None)
    assert answered.answered_at is not None
    assert answered.answered_at >= failing.failing_since
    assert (answered.failing_since, answered.reason) == (None, "")


async def test_what_is_damaged_or_given_up_says_nothing_of_the_store() -> None:
    clock = SystemClock()
    health, broken = StoreHealth(clock), BrokenStore()
    store = MeteredStore(broken, Metrics(CollectorRegistry()), clock, health)
    for broken.error in (RepositoryCorrupt("x"), asyncio.CancelledError()):
        with pytest.raises(type(broken.error)):
            await store.head("key")
    assert health.status(None) == StoreStatus(None, None, "", None, None)
