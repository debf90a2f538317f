"""How a drill ended is noted beside its base backup, and the agent of the server tells it."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest

from agent.domain.drill import DrillRecord
from agent.errors import RepositoryRefused
from agent.ports import Body
from agent.repository.drill_record import DRILLED, read_drill, write_drill
from agent.repository.keys import sentinel_key
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.status import Drill, DrilledBackup, DrillsStatus, FailedDrill
from agent.verify.drills import DrillWatch

NOW = datetime(2026, 11, 23, 2, 3, 4, 567, tzinfo=UTC)
HOUR = timedelta(hours=1)
OLD, NEW, LEFT = (f"base_{number:024X}" for number in (1 << 32, 2 << 32, 3 << 32))


@pytest.fixture
async def store() -> MemoryObjectStore:
    store = MemoryObjectStore(SystemClock())
    for backup in (OLD, NEW):
        await store.put(sentinel_key(backup), b"{}")
    return store


async def test_what_is_noted_is_read_and_a_failure_leaves_the_success_before_it(store: MemoryObjectStore) -> None:
    assert await read_drill(store, NEW) == DrillRecord()
    await write_drill(store, NEW, DrillRecord(NOW, NOW - HOUR, 1500))
    await write_drill(store, NEW, DrillRecord(failed_at=NOW + HOUR, exit_code=52))
    assert await read_drill(store, NEW) == DrillRecord(NOW, NOW - HOUR, 1500, NOW + HOUR, 52)


async def test_nothing_is_noted_beside_a_base_backup_that_is_gone(store: MemoryObjectStore) -> None:
    await write_drill(store, LEFT, DrillRecord(NOW, NOW, 1))
    assert await store.head(DRILLED.key(LEFT)) is None


async def test_a_drill_that_may_not_write_ends_as_it_would() -> None:
    class ReadOnly(MemoryObjectStore):
        async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
            raise RepositoryRefused("access denied")

    read_only = ReadOnly(SystemClock())
    await MemoryObjectStore.put(read_only, sentinel_key(NEW), b"{}")
    await write_drill(read_only, NEW, DrillRecord(NOW, NOW, 1))
    assert await read_drill(read_only, NEW) == DrillRecord()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"succeeded_at": 7}', b'{"succeeded_at": "yesterday"}', b"\xff"])
async def test_a_damaged_record_is_none_and_is_written_anew(store: MemoryObjectStore, body: bytes) -> None:
    await store.put(DRILLED.key(NEW), body)
    assert await read_drill(store, NEW) == DrillRecord()
    await write_drill(store, NEW, DrillRecord(NOW, NOW, 1))
    assert await read_drill(store, NEW) == DrillRecord(NOW, NOW, 1)


async def test_the_agent_tells_the_last_drills_also_when_their_base_backups_are_gone(store: MemoryObjectStore) -> None:
    watch = DrillWatch(store, SystemClock())
    assert watch.status() is None
    await watch.refresh()
    assert watch.status() == DrillsStatus(None, None, ())

    await write_drill(store, OLD, DrillRecord(NOW, NOW - HOUR, 1500, NOW - HOUR, 51))
    await write_drill(store, NEW, DrillRecord(failed_at=NOW + HOUR, exit_code=52))
    await watch.refresh()
    succeeded, failed = Drill(OLD, NOW, NOW - HOUR, 1.5), FailedDrill(NEW, NOW + HOUR, 52)
    drilled = (DrilledBackup(OLD, succeeded, FailedDrill(OLD, NOW - HOUR, 51)), DrilledBackup(NEW, None, failed))
    assert watch.status() == DrillsStatus(succeeded, failed, drilled)

    await store.delete([sentinel_key(OLD), DRILLED.key(OLD), sentinel_key(NEW), DRILLED.key(NEW)])
    await watch.refresh()
    assert watch.status() == DrillsStatus(succeeded, failed, ())
