"""What `pitr check` makes of stores that do not do what they should."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta

import pytest

from agent.check.store_trials import StoreTrials
from agent.domain.store_checks import Operation, StoreFacts
from agent.errors import RepositoryRefused, RepositoryUnavailable
from agent.ports import Body, ObjectInfo, ObjectStore, StoredObject
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore


class Stale(MemoryObjectStore):
    """Lists what is stored later."""

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        for info in tuple[ObjectInfo, ...]():
            yield info


class Altering(MemoryObjectStore):
    """Gives back other bytes, as one that stores a transfer's framing does."""

    async def get(self, key: str) -> StoredObject | None:
        found = await super().get(key)
        return found and StoredObject(found.info, b"5\r\n" + found.body)


class Replacing(MemoryObjectStore):
    """Knows no conditions."""

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        await self.put(key, body, metadata=metadata)
        return True


class Keeping(MemoryObjectStore):
    """Lets nobody delete."""

    async def delete(self, keys: Sequence[str]) -> None:
        raise RepositoryRefused("the store answered AccessDenied")


class Hiding(MemoryObjectStore):
    """Answers 403 for what is absent, as S3 does without s3:ListBucket."""

    async def get(self, key: str) -> StoredObject | None:
        found = await super().get(key)
        if found is None:
            raise RepositoryRefused("the store answered AccessDenied")
        return found


class Late(MemoryObjectStore):
    """Has another time of day."""

    async def time(self) -> datetime:
        return await super().time() - timedelta(minutes=7)


class Away(MemoryObjectStore):
    """Does not answer."""

    async def check(self) -> None:
        raise RepositoryUnavailable("the store did not answer")


async def tried(store: ObjectStore) -> StoreFacts:
    return await StoreTrials(store, SystemClock()).run()


async def test_a_store_that_does_all_passes_and_is_left_empty() -> None:
    store = MemoryObjectStore()
    facts = await tried(store)
    assert all(trial.seconds is not None for trial in facts.trials.values())
    assert (facts.left_behind, facts.skew) == ([], timedelta())
    assert [info async for info in store.list("")] == []


@pytest.mark.parametrize(
    ("store", "failing"),
    [
        (Stale(), {Operation.LIST_AFTER_PUT}),
        (Altering(), {Operation.GET, Operation.CONDITIONAL_PUT, Operation.LARGE_OBJECT}),
        (Replacing(), {Operation.CONDITIONAL_PUT}),
        (Keeping(), {Operation.DELETE}),
        (Hiding(), {Operation.ABSENT}),
    ],
)
async def test_what_a_store_does_not_do_is_found_out(store: MemoryObjectStore, failing: set[Operation]) -> None:
    facts = await tried(store)
    assert {name for name, trial in facts.trials.items() if trial.problem is not None} == failing
    left = [info.key async for info in MemoryObjectStore.list(store, "")]
    assert sorted(facts.left_behind) == left
    assert bool(left) == (Operation.DELETE in failing)


async def test_a_store_that_does_not_answer_is_asked_nothing_more() -> None:
    facts = await tried(Away())
    problems = {name: trial.problem for name, trial in facts.trials.items() if trial.problem is not None}
    assert list(problems) == [Operation.LIST]
    assert [name for name, trial in facts.trials.items() if trial.seconds is not None] == []
    assert facts.skew is None


async def test_the_difference_of_the_clocks_is_told() -> None:
    skew = (await tried(Late())).skew
    assert isinstance(skew, timedelta)
    assert timedelta(minutes=7) <= skew < timedelta(minutes=8)
