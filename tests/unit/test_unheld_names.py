"""One listing answers for the names that follow, and never says of a name that is held that it is not."""

from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from, tuples

from agent.repository.keys import wal_key
from agent.repository.unheld_names import FRESH_SECONDS, UnheldNames
from agent.storage.memory import MemoryObjectStore
from tests.support.stepwise import Request, StepwiseLoop, StepwiseStore, at_once

EXTENSIONS = ("", ".", ".lz4", ".zst")
NUMBERS = integers(0, 40)


def name_of(number: int, timeline: int = 1) -> str:
    return f"{timeline:08X}00000000{number:08X}"


class World:
    """A store whose listings are counted, and what remembers them."""

    def __init__(self) -> None:
        self.loop = StepwiseLoop()
        self.stored = MemoryObjectStore()
        self.requests: list[Request] = []
        self.names = UnheldNames(StepwiseStore(self.stored, self.requests))
        self.listings = 0

    def put(self, key: str) -> None:
        at_once(self.stored.put(key, b""))

    def may_be_held(self, name: str) -> bool:
        task = self.loop.create_task(self.names.may_be_held(name))
        self.loop.settle()
        while self.requests:
            self.listings += 1
            request = self.requests.pop()
            request.answer.set_result(at_once(request.act()))
            self.loop.settle()
        return task.result()


@given(
    lists(tuples(NUMBERS, sampled_from(EXTENSIONS), integers(1, 2))), lists(tuples(NUMBERS, integers(1, 2)), min_size=1)
)
def test_what_is_held_may_be_held_and_what_is_not_is_known(
    held: list[tuple[int, str, int]], asked: list[tuple[int, int]]
) -> None:
    world = World()
    for number, extension, timeline in held:
        world.put(wal_key(name_of(number, timeline), extension))
    names = {name_of(number, timeline) for number, _, timeline in held}
    for number, timeline in asked:
        assert world.may_be_held(name_of(number, timeline)) == (name_of(number, timeline) in names)
    world.loop.close()


def test_a_backlog_is_listed_once_and_again_when_the_listing_is_old() -> None:
    world = World()
    for number in range(300):
        assert not world.may_be_held(name_of(number))
    assert world.listings == 1
    world.put(wal_key(name_of(300), ".lz4"))
    world.loop.settle(seconds=FRESH_SECONDS)
    assert world.may_be_held(name_of(300))
    assert world.listings == 2
    world.loop.close()


def test_where_a_listing_was_cut_short_it_says_nothing() -> None:
    world = World()
    for number in range(1, 2500):
        world.put(wal_key(name_of(number), ".lz4"))
    assert not world.may_be_held(name_of(0))
    assert [world.may_be_held(name_of(number)) for number in (500, 999, 1000, 2499, 2500)] == [True] * 4 + [False]
    assert world.listings > 1
    world.loop.close()


def test_of_other_wal_files_nothing_is_remembered() -> None:
    world = World()
    for name in ("00000002.history", name_of(1) + ".partial", name_of(1) + ".00000028.backup"):
        assert world.may_be_held(name)
    assert not world.listings
    world.loop.close()
