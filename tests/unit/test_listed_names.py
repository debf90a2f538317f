"""One listing answers for the names that follow, and never says of a name that is held that it is not."""

from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from, tuples

from agent.repository.keys import wal_key
from agent.repository.listed_names import FRESH_SECONDS, ListedNames
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
        self.names = ListedNames(StepwiseStore(self.stored, self.requests))
        self.listings = 0

    def put(self, key: str) -> None:
        at_once(self.stored.put(key, b""))

    def objects(self, name: str) -> int | None:
        task = self.loop.create_task(self.names.objects(name))
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
def test_each_name_is_told_with_as_many_objects_as_it_has(
    held: list[tuple[int, str, int]], asked: list[tuple[int, int]]
) -> None:
    world = World()
    for number, extension, timeline in held:
        world.put(wal_key(name_of(number, timeline), extension))
    for number, timeline in asked:
        extensions = {extension for known, extension, of in held if (known, of) == (number, timeline)}
        assert world.objects(name_of(number, timeline)) == len(extensions)
    world.loop.close()


def test_a_backlog_is_listed_once_and_again_when_the_listing_is_old() -> None:
    world = World()
    for number in range(300):
        assert world.objects(name_of(number)) == 0
    assert world.listings == 1
    world.put(wal_key(name_of(300), ".lz4"))
    world.loop.settle(seconds=FRESH_SECONDS)
    assert world.objects(name_of(300)) == 1
    assert world.listings == 2
    world.loop.close()


def test_where_a_listing_was_cut_short_it_says_nothing() -> None:
    world = World()
    for number in range(1, 2500):
        world.put(wal_key(name_of(number), ".lz4"))
    assert [world.objects(name_of(number)) for number in (0, 500, 999, 1000, 2499, 2500)] == [0, 1, 1, 1, 1, 0]
    assert world.listings > 1
    world.loop.close()


def test_of_other_wal_files_nothing_is_remembered() -> None:
    world = World()
    for name in ("00000002.history", name_of(1) + ".partial", name_of(1) + ".00000028.backup"):
        assert world.objects(name) is None
    assert not world.listings
    world.loop.close()
