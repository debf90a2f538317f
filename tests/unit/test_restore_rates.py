"""How long a restore takes is told by what an earlier one took, or by an assumption that is called one."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import pytest

from agent.domain.restore_rates import ASSUMED_REPLAY_RATE, TELLING_BYTES, RestoreRates, estimate_restore, rates_of
from agent.errors import RepositoryRefused
from agent.ports import Body
from agent.repository import restore_record
from agent.repository.keys import sentinel_key
from agent.repository.restore_record import RESTORED, read_restore_rates, write_restore_rates
from agent.storage.memory import MemoryObjectStore
from tests.support.walg_backup import SMALL, BackupContent, plan_of

NOW = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
CONTENT = BackupContent(parts=[SMALL])
PLAN = plan_of(CONTENT)
STORED = sum(backup.stored_bytes for backup in PLAN.chain)
WAL = len(PLAN.segments) * PLAN.segment_bytes


def test_nothing_measured_is_an_assumption_and_no_figure() -> None:
    estimate = estimate_restore(PLAN, [])
    assert (estimate.replay_seconds, estimate.replay_measured_at) == (WAL / ASSUMED_REPLAY_RATE, None)
    assert (estimate.hydrate_seconds, estimate.hydrate_measured_at) == (None, None)


def test_the_newest_restore_that_had_enough_to_do_tells_each_rate() -> None:
    later = NOW + timedelta(days=1)
    latest = NOW + timedelta(days=2)
    told = [
        rates_of(later, (TELLING_BYTES, 2.0), (TELLING_BYTES - 1, 0.1)),
        rates_of(NOW, (TELLING_BYTES, 1.0), (TELLING_BYTES, 8.0)),
        rates_of(latest, (0, 1.0), (TELLING_BYTES, None)),
    ]
    estimate = estimate_restore(PLAN, told)
    assert estimate.hydrate_seconds == pytest.approx(STORED / (TELLING_BYTES / 2))
    assert estimate.replay_seconds == pytest.approx(WAL / (TELLING_BYTES / 8))
    assert (estimate.hydrate_measured_at, estimate.replay_measured_at) == (later, NOW)


class RefusingStore(MemoryObjectStore):
    """Lets nothing be read, as a policy may."""

    def open(self, key: str) -> NoReturn:
        raise RepositoryRefused(f"access to {key} is denied")


async def test_a_plan_goes_without_records_that_may_not_be_read() -> None:
    assert await read_restore_rates(RefusingStore(), PLAN.chain) == []


async def test_what_was_measured_is_read_back_and_a_damaged_record_is_none() -> None:
    store, rates = MemoryObjectStore(), RestoreRates(NOW, 1000.0, None)
    name = PLAN.backup.name
    await write_restore_rates(store, name, rates)
    assert await read_restore_rates(store, PLAN.chain) == [], "the base backup is not there"
    await store.put(sentinel_key(name), b"{}")
    await write_restore_rates(store, name, rates)
    assert await read_restore_rates(store, PLAN.chain) == [rates]
    for damaged in (b"", b"[]", b'{"measured_at": 5}', b'{"replay_bytes_per_second": 7}'):
        await store.put(RESTORED.key(name), damaged)
        assert await read_restore_rates(store, PLAN.chain) == []


async def test_a_restore_does_not_wait_for_a_store_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(MemoryObjectStore):
        async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
            await asyncio.Event().wait()

    store = Away()
    await MemoryObjectStore.put(store, sentinel_key(PLAN.backup.name), b"{}")
    monkeypatch.setattr(restore_record, "WRITE_SECONDS", 0.1)
    async with asyncio.timeout(60):
        await write_restore_rates(store, PLAN.backup.name, RestoreRates(NOW, 1.0, 1.0))
    assert await store.head(RESTORED.key(PLAN.backup.name)) is None
