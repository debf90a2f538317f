"""WAL summaries name the blocks of an increment: all that changed, and all that may still show an earlier page."""

import struct
from itertools import pairwise

from hypothesis import given
from hypothesis.strategies import dictionaries, integers, lists, sets, tuples

from agent.domain.delta_file import RelationSegment
from agent.domain.timeline import Ancestor, path_to
from agent.domain.wal_summaries import MAX_BLOCKS, ChangedBlocks, WalSummary, covering

DEFAULT, DATABASE = 1663, 5
SEGMENT_BLOCKS = 16
RELATIONS = integers(16384, 16387)
BLOCKS = integers(0, 3 * SEGMENT_BLOCKS - 1)


def packed(*blocks: int) -> bytes:
    return struct.pack(f">{len(blocks)}Q", *blocks)


def of(changed: ChangedBlocks, relation: int, segment: int, blocks: int) -> list[int] | None:
    found = changed.of(RelationSegment(DEFAULT, DATABASE, relation, segment), blocks, SEGMENT_BLOCKS)
    return None if found is None else list(found)


@given(
    lists(tuples(RELATIONS, lists(BLOCKS, min_size=1)), max_size=8),
    dictionaries(RELATIONS, BLOCKS),
    RELATIONS,
    integers(0, 2),
    integers(0, SEGMENT_BLOCKS),
)
def test_an_increment_holds_each_changed_block_once_and_all_from_where_the_relation_was_cut(
    rows: list[tuple[int, list[int]]], limits: dict[int, int], relation: int, segment: int, blocks: int
) -> None:
    changed = ChangedBlocks()
    for number, found in rows:
        assert changed.add(DEFAULT, DATABASE, number, packed(*found))
    for number, shortest in limits.items():
        changed.add_limit(DEFAULT, DATABASE, number, shortest + 5)
        changed.add_limit(DEFAULT, DATABASE, number, shortest)
    changed.seal()
    first, limit = segment * SEGMENT_BLOCKS, limits.get(relation)
    expected = {
        block
        for block in range(blocks)
        if any(number == relation and first + block in found for number, found in rows)
        or (limit is not None and first + block >= limit)
    }
    if limit is not None and limit <= first:
        assert of(changed, relation, segment, blocks) is None
    else:
        assert of(changed, relation, segment, blocks) == sorted(expected)


def test_a_database_that_was_made_is_stored_whole() -> None:
    changed = ChangedBlocks()
    changed.add_limit(DEFAULT, DATABASE, 0, 0)
    changed.seal()
    assert of(changed, 16384, 0, 4) is None
    assert changed.of(RelationSegment(DEFAULT, 6, 16384, 0), 4, SEGMENT_BLOCKS) is not None
    assert changed.of(RelationSegment(16400, DATABASE, 16384, 0), 4, SEGMENT_BLOCKS) is not None


def test_too_many_blocks_are_told_before_they_fill_the_memory() -> None:
    changed = ChangedBlocks()
    many = bytes(8 * (MAX_BLOCKS // 4))
    assert [changed.add(DEFAULT, DATABASE, 16384, many) for _ in range(5)] == [True] * 4 + [False]


def test_summaries_cover_a_range_only_without_a_gap() -> None:
    path = path_to(1, ())
    first, second, third = (WalSummary(1, start, start + 10) for start in (10, 20, 30))
    assert covering([third, first, second], path, 12, 35) == [first, second, third]
    assert covering([first, second, third], path, 20, 30) == [second]
    assert covering([first, third], path, 12, 35) is None
    assert covering([first, second], path, 12, 35) is None
    assert covering([second, third], path, 12, 35) is None
    assert covering([WalSummary(2, 0, 100)], path, 12, 35) is None


@given(integers(1, 50), integers(1, 50), sets(integers(1, 99), max_size=6))
def test_every_timeline_on_the_way_must_be_summarized(start: int, length: int, cuts: set[int]) -> None:
    end, path = start + length, path_to(3, (Ancestor(1, 20), Ancestor(2, 60)))
    edges = [0, *sorted(cuts | {20, 60}), 100]
    held = [WalSummary(1 if low < 20 else 2 if low < 60 else 3, low, high) for low, high in pairwise(edges)]
    needed = [summary for summary in held if summary.end_lsn > start and summary.start_lsn < end]
    assert covering(held, path, start, end) == needed
    for summary in needed:
        assert covering([other for other in held if other != summary], path, start, end) is None
