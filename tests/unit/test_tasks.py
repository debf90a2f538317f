"""Tasks and threads end in order."""

import asyncio
import threading

import pytest

from agent.errors import RepositoryUnavailable
from agent.tasks import in_thread, task_group


async def test_the_first_error_of_a_group_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise RepositoryUnavailable("the store is away")

    async def work() -> None:
        async with task_group() as group, task_group() as inner:
            group.create_task(asyncio.Event().wait(), name="cancelled")
            inner.create_task(fail(), name="failing")
            await asyncio.Event().wait()

    with pytest.raises(RepositoryUnavailable, match="the store is away"):
        await work()


async def test_an_error_of_a_group_keeps_its_cause() -> None:
    async def fail() -> None:
        raise RepositoryUnavailable("the store is away") from OSError("no route")

    with pytest.raises(RepositoryUnavailable) as raised:
        async with task_group() as group:
            group.create_task(fail(), name="failing")
    assert isinstance(raised.value.__cause__, OSError)


async def test_a_cancelled_call_waits_for_its_thread() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(60)
        ended.set()
        raise RepositoryUnavailable("nobody hears of this")

    task = asyncio.create_task(in_thread(work))
    await in_thread(begun.wait, 60)
    for _ in range(2):  # a time-out, and then the end of the agent
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
