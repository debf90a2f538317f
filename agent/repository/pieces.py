"""Objects that are taken as they arrive."""

from collections.abc import Callable

from agent.ports import ObjectStore
from agent.tasks import in_thread


async def take_pieces(store: ObjectStore, key: str, take: Callable[[bytes], object]) -> bool:
    """Call `take`, which may block, with each piece of the object `key`, in a thread; return whether it is there.

    Raises:
        RepositoryError: It could not be read, or what `take` raises.
    """
    async with store.open(key) as pieces:
        if pieces is None:
            return False
        async for piece in pieces:
            await in_thread(take, piece)
    return True
