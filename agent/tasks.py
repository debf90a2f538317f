"""Tasks and threads, ended in order."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose first error is raised as it is, instead of in an ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = _first(errors)
        raise error from error.__cause__  # without the group, but with what it was itself raised from


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def by_name(
    names: Sequence[str], work: Callable[[str], Coroutine[Any, Any, T]], *, at_once: int = 8
) -> dict[str, T]:
    """Return what `work` gives for each of `names`, some of them at once; the first error is raised."""
    limit = asyncio.Semaphore(at_once)

    async def limited(name: str) -> T:
        async with limit:
            return await work(name)

    async with task_group() as group:
        tasks = {name: group.create_task(limited(name), name=f"read {name}") for name in names}
    return {name: task.result() for name, task in tasks.items()}


async def in_thread(
    function: Callable[..., T],
    *arguments: Any,
    executor: Executor | None = None,
    undo: Callable[[T], object] = lambda _: None,
) -> T:
    """Call `function` in a thread, one of `executor` if given.

    Cancelled, however often, it waits for the thread first: what it uses may then be closed. What `function` returns
    goes to `undo` then, instead of the caller.
    """
    call = partial(contextvars.copy_context().run, function, *arguments)  # as asyncio.to_thread does
    work = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled() and work.exception() is None:  # the cancellation is what the caller hears of
            undo(work.result())
        raise


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of `waits` does; the others are cancelled."""
    async with task_group() as group:
        tasks = [group.create_task(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
