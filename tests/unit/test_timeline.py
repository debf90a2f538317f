import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from agent.domain.lsn import format_lsn
from agent.domain.timeline import Ancestor, history_name, newest_timeline, parse_history, path_to, timeline_at

ANCESTORS = lists(integers(1, 50), min_size=0, max_size=8, unique=True).map(sorted)


@given(ANCESTORS, integers(51, 60))
def test_a_history_is_read_as_it_was_written(timelines: list[int], own: int) -> None:
    ancestors = tuple(Ancestor(timeline, timeline * 1000) for timeline in timelines)
    text = "\n\n".join(f"{a.timeline}\t{format_lsn(a.switch_lsn)}\tno recovery target specified" for a in ancestors)
    assert parse_history(own, text) == ancestors


def test_a_name_in_a_history_may_hold_what_ends_a_line_elsewhere() -> None:
    text = '1\t0/9000000\tat restore point "a\x85b\u2028c\rd"\n'
    assert parse_history(2, text) == (Ancestor(1, 0x9000000),)


def test_comments_and_blank_lines_of_a_history_are_passed_over() -> None:
    assert parse_history(3, '# why\n\n1\t0/9000000\tat restore point "x"\n\n2\t0/C000000\t\n') == (
        Ancestor(1, 0x9000000),
        Ancestor(2, 0xC000000),
    )


@pytest.mark.parametrize("text", ["x\t0/1\t", "1\t0-1\t", "2\t0/1\t\n1\t0/2\t", "1\t0/1\t\n1\t0/2\t", "3\t0/1\t"])
def test_a_damaged_history_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"00000003\.history"):
        parse_history(3, text)


@given(ANCESTORS, integers(0, 70_000))
def test_every_lsn_lies_on_exactly_one_stretch_of_a_path(timelines: list[int], lsn: int) -> None:
    path = path_to(99, [Ancestor(timeline, timeline * 1000) for timeline in timelines])
    holding = [s for s in path if s.from_lsn <= lsn and (s.to_lsn is None or lsn < s.to_lsn)]
    assert [s.timeline for s in holding] == [timeline_at(path, lsn)]
    assert path[-1].timeline == 99


@given(lists(integers(1, 20), min_size=1, max_size=6), integers(0, 22))
def test_a_path_is_what_postgresql_makes_of_a_history_whose_lsns_go_back(switches: list[int], lsn: int) -> None:
    ancestors = [Ancestor(number, switch_lsn) for number, switch_lsn in enumerate(switches, 1)]
    own = len(ancestors) + 1
    # tliOfPointInHistory() in PostgreSQL's timeline.c: the newest line whose begin and end hold the LSN.
    begins, ends = [0, *switches], [*switches, 1 << 64]
    found = next(tli for tli in range(own, 0, -1) if begins[tli - 1] <= lsn < ends[tli - 1])
    assert timeline_at(path_to(own, ancestors), lsn) == found


def test_names_of_histories_are_hexadecimal() -> None:
    assert history_name(26) == "0000001A.history"


def test_latest_stops_at_the_first_missing_history() -> None:
    assert newest_timeline({2: (), 3: (), 5: ()}, 1) == 3
    assert newest_timeline({}, 4) == 4
