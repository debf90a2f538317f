import asyncio

from hypothesis import given
from hypothesis.strategies import integers, lists

from agent.budget import MemoryBudget


@given(lists(integers(0, 150), min_size=1, max_size=12))
def test_reservations_never_exceed_the_budget_unless_one_is_alone(sizes: list[int]) -> None:
    async def run() -> None:
        budget, held = MemoryBudget(100), []

        async def work(size: int) -> None:
            async with budget.reserve(size):
                held.append(size)
                assert sum(held) <= 100 or len([item for item in held if item]) == 1
                await asyncio.sleep(0)
                held.remove(size)

        async with asyncio.TaskGroup() as group:
            for size in sizes:
                group.create_task(work(size))
        assert budget.used == 0

    asyncio.run(run())


async def test_a_wait_that_is_cancelled_just_as_its_turn_comes_takes_nothing() -> None:
    budget = MemoryBudget(10)

    async def hold(until: asyncio.Event) -> None:
        async with budget.reserve(10):
            await until.wait()

    release = asyncio.Event()
    first, second = asyncio.create_task(hold(release)), asyncio.create_task(hold(asyncio.Event()))
    await asyncio.sleep(0)
    release.set()
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([first, second])
    assert second.cancelled()
    assert budget.used == 0


async def test_a_cancelled_wait_gives_its_place_away() -> None:
    budget = MemoryBudget(100)

    async def hold(size: int) -> None:
        async with budget.reserve(size):
            await asyncio.Event().wait()

    async with budget.reserve(80):
        waiting = asyncio.create_task(hold(50))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(1), budget.reserve(100):
        assert budget.used == 100
