"""Every record comes out of the WAL as it went in, wherever pages and segments end."""

from hypothesis import given, settings
from hypothesis.strategies import integers, lists, one_of, sampled_from, tuples

from agent.domain.wal import MAGIC_BY_MAJOR
from agent.domain.wal_walk import WalWalk
from tests.support.wal_writer import SEGMENT_BYTES, WalWriter

SIZES = one_of(integers(0, 300), integers(7_900, 8_400), integers(0, 60_000), integers(900_000, 2_500_000))
ACTIONS = lists(tuples(sampled_from(["record", "record", "record", "switch", "give up"]), SIZES), max_size=12)


def walked(segments: list[bytes]) -> list[tuple[int, int]]:
    walk = WalWalk()
    return [(lsn, len(data)) for segment in segments for lsn, data in walk.take(segment)]


@settings(max_examples=60)
@given(sampled_from(sorted(MAGIC_BY_MAJOR)), ACTIONS)
def test_every_record_is_yielded_where_it_was_written(major: int, actions: list[tuple[str, int]]) -> None:
    writer = WalWriter(major=major)
    expected: list[tuple[int, int]] = []
    for action, size in actions:
        if action == "record":
            header = 0 if not size else 2 if size < 256 else 5
            expected.append((writer.filler(size)[0], 24 + header + size))
        elif action == "switch":
            expected.append((writer.switch()[0], 24))
        else:
            writer.give_up_record(20_000)
    assert walked(writer.segments()) == expected


def test_a_record_that_began_in_a_segment_not_taken_is_passed_over() -> None:
    writer = WalWriter()
    writer.filler(SEGMENT_BYTES)
    after = writer.filler(10)
    writer.filler(SEGMENT_BYTES)
    first, second, third = writer.segments()
    assert walked([second]) == [(after[0], 36)]
    assert walked([first, third]) == []
