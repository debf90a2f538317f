"""When a call is repeated, and when not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers
from structlog.testing import capture_logs

from agent.errors import RepositoryCorrupt, RepositoryError, RepositoryRefused, RepositoryUnavailable
from agent.ports import OpenObject
from agent.storage.health import StoreHealth
from agent.storage.memory import MemoryObjectStore
from agent.storage.retrying import Retry, RetryingStore


class PresetClock:
    """A clock that moves only when someone sleeps."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


class Stumbling:
    """A call that fails `failures` times with `error`."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.attempts = 0
        self._failures = failures
        self._error = error or RepositoryUnavailable("the store did not answer")

    async def __call__(self) -> str:
        self.attempts += 1
        if self.attempts <= self._failures:
            raise self._error
        return "done"


@given(failures=integers(0, 12))
async def test_a_passing_fault_is_outlived(failures: int) -> None:
    clock, call = PresetClock(), Stumbling(failures)
    assert await Retry(clock, 600)(call) == "done"
    assert call.attempts == failures + 1
    assert all(delay <= min(10, 0.2 * 2**number) for number, delay in enumerate(clock.slept))


@given(deadline=floats(0, 100))
async def test_no_attempt_begins_after_the_deadline(deadline: float) -> None:
    clock, call = PresetClock(), Stumbling(failures=1_000_000)
    with pytest.raises(RepositoryUnavailable, match="the store did not answer"):
        await Retry(clock, deadline)(call)
    assert clock.seconds <= 1000 + deadline
    assert call.attempts == len(clock.slept) + 1


async def test_health_hears_of_each_attempt_not_of_the_call_that_ends_minutes_later() -> None:
    clock, call = PresetClock(), Stumbling(failures=3)
    health = StoreHealth(clock)
    told = []

    class Watching(PresetClock):
        async def sleep(self, seconds: float) -> None:
            await clock.sleep(seconds)
            told.append(health.status(None).failing_since)

    assert await Retry(Watching(), 600, health=health)(call) == "done"
    assert told == [datetime.fromtimestamp(1000, UTC)] * 3
    assert health.status(None).failing_since is None
    assert health.status(None).answered_at == clock.now()


@pytest.mark.parametrize("error", [RepositoryRefused("no"), RepositoryCorrupt("no"), RepositoryError("no"), KeyError()])
async def test_a_lasting_fault_is_reported_at_once(error: Exception) -> None:
    call = Stumbling(1, error)
    with pytest.raises(type(error)):
        await Retry(PresetClock(), 600)(call)
    assert call.attempts == 1


class UnsteadyStore(MemoryObjectStore):
    """A store on which the next `failures` calls fail."""

    failures = 0

    async def _stumble(self) -> None:
        if self.failures:
            self.failures -= 1
            raise RepositoryUnavailable("the store did not answer")

    async def check(self) -> None:
        await self._stumble()

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        await self._stumble()
        async with super().open(key) as pieces:
            yield pieces


async def test_opening_is_repeated_and_a_check_only_for_seconds() -> None:
    inner, clock = UnsteadyStore(), PresetClock()
    store = RetryingStore(inner, Retry(clock, 600))
    await store.put("key", b"content")
    inner.failures = 3
    async with store.open("key") as pieces:
        assert pieces is not None
        assert [piece async for piece in pieces] == [b"content"]
    inner.failures = 1
    await store.check()
    inner.failures, began = 1000, clock.monotonic()
    with pytest.raises(RepositoryUnavailable):
        await store.check()
    assert clock.monotonic() - began <= 5


async def test_an_outage_is_told_at_its_beginning_every_five_minutes_and_at_its_end() -> None:
    clock = PresetClock()
    retry = Retry(clock, 3600)
    with capture_logs() as told:
        assert await retry(Stumbling(300)) == "done"
        minutes = (clock.monotonic() - 1000) / 60
        await clock.sleep(10)
        assert await retry(Stumbling(0)) == "done"
    first, *reminders, last = told
    assert (first["event"], first["failures"]) == ("repository requests fail", 1)
    assert (last["event"], last["failures"]) == ("repository requests succeed again", 300)
    assert minutes / 5 - 2 <= len(reminders) <= minutes / 5


async def test_a_store_that_fails_now_and_then_is_one_outage() -> None:
    clock = PresetClock()
    retry = Retry(clock, 60)
    with capture_logs() as told:
        for _ in range(100):
            await retry(Stumbling(1))
    assert [line["event"] for line in told] == ["repository requests fail"]


async def test_another_kind_of_failure_in_an_outage_is_told() -> None:
    retry = Retry(PresetClock(), 60)
    with capture_logs() as told:
        for hint in ("the network", "the clock") * 10:
            await retry(Stumbling(1, RepositoryUnavailable("cannot store x", hint=hint)))
    assert [line["error"] for line in told] == ["cannot store x. the network", "cannot store x. the clock"]
