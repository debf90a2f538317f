import asyncio

from hypothesis import given
from hypothesis.strategies import booleans, integers, lists, tuples

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


@given(lists(tuples(integers(0, 150), booleans()), min_size=1, max_size=12))
def test_background_work_gets_half_at_most_and_other_work_never_waits_for_it_to_end(
    works: list[tuple[int, bool]],
) -> None:
    async def run() -> None:
        budget, held = MemoryBudget(100), {True: [0], False: [0]}
        foreground_done = asyncio.Event()

        async def work(size: int, background: bool) -> None:
            async with budget.reserve(size, background=background):
                held[background].append(size)
                if background:
                    assert sum(held[True]) <= 50 or sum(map(bool, held[True])) == 1
                    await foreground_done.wait()
                else:
                    await asyncio.sleep(0)
                held[background].remove(size)

        async with asyncio.TaskGroup() as group:
            tasks = [(group.create_task(work(*item)), item[1]) for item in works]
            await asyncio.gather(*[task for task, background in tasks if not background])
            foreground_done.set()
        assert budget.used == 0

    asyncio.run(run())


async def test_nothing_is_begun_in_the_background_while_other_work_waits() -> None:
    budget = MemoryBudget(100)
    async with budget.reserve(90):
        other, background = budget.reserve(80), budget.reserve(10, background=True)
        tasks = [asyncio.create_task(context.__aenter__()) for context in (other, background)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False]
    await asyncio.gather(*tasks)
    assert budget.used == 90
    for context in (other, background):
        await context.__aexit__(None, None, None)
    assert budget.used == 0
