"""Which WAL must be archived by now, on generated histories of servers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

from hypothesis import assume, given
from hypothesis.strategies import DrawFn, booleans, composite, integers, lists, sampled_from, sets

from agent.domain.catalog import Backup
from agent.domain.timeline import Ancestor, path_to, timeline_at
from agent.domain.wal import segment_name
from agent.domain.wal_continuity import (
    ServerWal,
    find_gaps,
    finished_end,
    first_wanted,
    needs_backup,
)
from agent.domain.wal_runs import merged, ranges_by_timeline

SIZE = 1 << 20
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def a_backup(timeline: int, start_lsn: int, finish_lsn: int, *, permanent: bool = False) -> Backup:
    name = f"base_{segment_name(timeline, start_lsn, SIZE)}"
    return Backup(
        name, timeline, start_lsn, finish_lsn, NOW, NOW, NOW, 150000, 1, 0, 0, permanent, None, None, 0
    )  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A server's WAL with nothing lost: `names` of all its finished segments, and what is on other branches."""

    wal: ServerWal
    names: tuple[str, ...]
    strays: tuple[str, ...]

    def held_without(self, missing: Sequence[str]) -> dict[int, list[range]]:
        names = sorted({*self.names, *self.strays} - set(missing))
        return ranges_by_timeline(names, SIZE)


@composite
def servers(draw: DrawFn) -> Served:
    """A server that has written from segment 1, changed its timeline a few times, and finished some segments since."""
    switches = sorted(draw(lists(integers(SIZE, 30 * SIZE), max_size=3)))
    timelines = sorted(draw(sets(integers(1, 9), min_size=len(switches) + 1, max_size=len(switches) + 1)))
    path = path_to(timelines[-1], [Ancestor(*pair) for pair in zip(timelines, switches, strict=False)])
    end = (switches[-1] if switches else SIZE) // SIZE + draw(integers(1, 10))
    wal = ServerWal(path, end, frozenset(), SIZE)
    # What was written on a timeline after it was left, and up to where: archived by whoever stayed there.
    strays = tuple(
        segment_name(stretch.timeline, number * SIZE, SIZE)
        for stretch in path[:-1]
        if stretch.to_lsn is not None
        for number in range(stretch.to_lsn // SIZE, stretch.to_lsn // SIZE + draw(integers(0, 5)))
    )
    return Served(wal, tuple(wal.segment(number) for number in range(1, end)), strays)


@given(servers())
def test_a_whole_archive_has_no_gap(served: Served) -> None:
    assert find_gaps(served.wal, [], served.held_without([])) == ()


@given(servers())
def test_an_empty_repository_has_no_gap(served: Served) -> None:
    assert find_gaps(served.wal, [], {}) == ()


@given(servers(), sets(integers(2, 45)))
def test_exactly_what_is_missing_after_the_first_segment_is_found(served: Served, missing: set[int]) -> None:
    numbers = sorted(number for number in missing if number < served.wal.end)
    gaps = find_gaps(served.wal, [], served.held_without([served.wal.segment(number) for number in numbers]))
    assert [number for gap in gaps for number in gap.numbers] == numbers
    assert all(gap.first == served.wal.segment(gap.numbers[0]) for gap in gaps)
    assert all(gap.last == served.wal.segment(gap.numbers[-1]) for gap in gaps)
    assert all(before.numbers.stop < after.numbers.start for before, after in pairwise(gaps))


@given(servers(), sets(integers(1, 45)))
def test_what_postgresql_will_still_ask_for_is_not_missing(served: Served, pending: set[int]) -> None:
    names = frozenset(served.wal.segment(number) for number in pending if number < served.wal.end)
    wal = replace(served.wal, pending=names | {"00000007.history", "junk"})
    assert find_gaps(wal, [], served.held_without(sorted(names))) == ()


@given(servers(), integers(1, 45))
def test_wal_from_before_the_oldest_backup_may_be_gone(served: Served, start: int) -> None:
    start = min(start, served.wal.end - 1)
    lsn = start * SIZE + 40
    backup = a_backup(timeline_at(served.wal.path, lsn), lsn, lsn)
    assume(served.wal.segment(start).startswith(f"{backup.timeline:08X}"))
    expired = [served.wal.segment(number) for number in range(1, start)]
    assert find_gaps(served.wal, [backup], served.held_without(expired)) == ()
    found = find_gaps(served.wal, [backup], served.held_without([*expired, served.wal.segment(start)]))
    assert [gap.first for gap in found] == [served.wal.segment(start)]
    assert first_wanted(served.wal, [backup]) == start
    assert needs_backup(found[0], served.wal, [backup])


def test_a_backup_that_begins_after_a_gap_makes_another_one_needless() -> None:
    wal = ServerWal(path_to(1, []), 20, frozenset(), SIZE)
    old, new = a_backup(1, 2 * SIZE, 2 * SIZE + 9), a_backup(1, 11 * SIZE, 11 * SIZE + 9)
    (gap,) = find_gaps(wal, [old, new], {1: [range(2, 7), range(11, 20)]})
    assert gap.numbers == range(7, 11)
    assert not needs_backup(gap, wal, [old, new])
    assert needs_backup(gap, wal, [old, a_backup(1, 10 * SIZE + 5, 11 * SIZE)])


def test_between_permanent_backups_expiry_leaves_only_what_makes_them_consistent() -> None:
    wal = ServerWal(path_to(1, []), 30, frozenset(), SIZE)
    kept = [a_backup(1, 3 * SIZE + 40, 5 * SIZE, permanent=True), a_backup(1, 20 * SIZE + 40, 20 * SIZE + 99)]
    assert find_gaps(wal, kept, {1: [range(3, 5), range(20, 30)]}) == ()
    assert [gap.numbers for gap in find_gaps(wal, kept, {1: [range(3, 4), range(20, 30)]})] == [range(4, 5)]
    only = [replace(backup, permanent=True) for backup in kept]
    assert [gap.numbers for gap in find_gaps(wal, only, {1: [range(3, 5), range(20, 29)]})] == [range(29, 30)]


def test_a_backup_of_another_branch_asks_for_nothing() -> None:
    wal = ServerWal(path_to(3, [Ancestor(1, 10 * SIZE + 77)]), 15, frozenset(), SIZE)
    elsewhere = [a_backup(2, 2 * SIZE, 3 * SIZE), a_backup(1, 10 * SIZE, 11 * SIZE)]
    held = {1: [range(8, 12)], 3: [range(10, 15)]}
    assert find_gaps(wal, elsewhere, held) == ()
    assert first_wanted(wal, elsewhere) is None


def test_the_segment_of_a_fork_is_due_on_the_later_timeline_only_when_that_has_finished_it() -> None:
    path = path_to(2, [Ancestor(1, 5 * SIZE + 100)])
    parent = [segment_name(1, number * SIZE, SIZE) for number in range(1, 5)]
    promoted = finished_end(path, ["00000002.history", *parent, f"{segment_name(1, 5 * SIZE, SIZE)}.partial"], SIZE)
    assert promoted == 5
    wal = ServerWal(path, promoted, frozenset(), SIZE)
    assert find_gaps(wal, [], {1: [range(1, 5)]}) == ()
    assert [gap.numbers for gap in find_gaps(wal, [], {1: [range(1, 2)]})] == [range(2, 5)]
    finished = finished_end(path, ["00000002.history", segment_name(2, 5 * SIZE, SIZE)], SIZE)
    assert finished == 6
    assert [gap.first for gap in find_gaps(replace(wal, end=6), [], {1: [range(1, 6)]})] == ["000000020000000000000005"]


def test_a_server_that_marks_nothing_of_its_timeline_does_not_archive_it() -> None:
    restored = path_to(2, [Ancestor(1, 5 * SIZE + 100)])
    assert finished_end(restored, [segment_name(1, 4 * SIZE, SIZE)], SIZE) is None
    assert finished_end(path_to(1, []), [], SIZE) is None
    assert finished_end(path_to(1, []), ["junk", "0000000100000000FFFFFFFF"], SIZE) is None


@given(servers(), integers(0, 45))
def test_what_was_proven_before_need_not_be_listed_again(served: Served, proven: int) -> None:
    proven = min(proven, served.wal.end)
    lsn = SIZE + 40
    backup = a_backup(timeline_at(served.wal.path, lsn), lsn, lsn)
    listed = served.held_without([served.wal.segment(number) for number in range(1, proven)])
    assert find_gaps(served.wal, [backup], listed, proven) == ()


@given(lists(integers(0, 60)), booleans(), sampled_from([SIZE, 16 * SIZE]))
def test_ranges_hold_the_same_numbers_as_the_names(numbers: list[int], in_order: bool, size: int) -> None:
    names = [segment_name(1, number * size, size) for number in (sorted(numbers) if in_order else numbers)]
    ranges = merged(ranges_by_timeline([*names, "00000001.history"], size).get(1, []))
    assert [number for each in ranges for number in each] == sorted(set(numbers))
    assert all(before.stop < after.start for before, after in pairwise(ranges))
