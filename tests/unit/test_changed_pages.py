"""By their own LSNs, every page that may have changed since the parent is found."""

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from agent.domain.delta_file import (
    CLOCK_MARGIN_NS,
    RelationSegment,
    is_paged,
    may_be_left_out,
    relation_segment,
)
from agent.domain.page import PAGE_BYTES, changed_pages
from tests.support.pages import unchecked_page as page

NEW_PAGE = bytes(PAGE_BYTES)
FIRST = 1 << 20  # the lowest LSN that any WAL has
LSNS = integers(FIRST, (1 << 64) - 1)


@given(lists(LSNS, min_size=1, max_size=20), LSNS)
def test_a_page_is_changed_if_its_lsn_is_not_before(lsns: list[int], since: int) -> None:
    found = changed_pages(b"".join(page(lsn) for lsn in lsns), since)
    assert found is not None
    assert list(found) == [lsn >= since for lsn in lsns]


@given(integers(0, FIRST - 1))
def test_a_page_whose_lsn_is_of_no_wal_always_goes_along(lsn: int) -> None:
    assert changed_pages(page(1 << 30) + page(lsn), (1 << 30) + 1) == b"\0\1"


def test_a_new_page_always_goes_along() -> None:
    assert changed_pages(NEW_PAGE + page(FIRST), 1 << 30) == b"\1\0"


@pytest.mark.parametrize(
    ("offset", "value"), [(10, 8), (12, 23), (12, 0x3000), (14, 0x3000), (16, 0x3000), (18, 0x1004), (18, 0x2006)]
)
def test_among_what_is_no_page_nothing_is_told_from_lsns(offset: int, value: int) -> None:
    odd = bytearray(page(FIRST))
    odd[offset : offset + 2] = value.to_bytes(2, "little")
    assert changed_pages(page(FIRST) + bytes(odd), 1 << 30) is None


def test_the_numbers_are_exact_beyond_what_a_double_holds() -> None:
    lsn = (1 << 63) + 1
    assert changed_pages(page(lsn - 1) + page(lsn), lsn) == b"\0\1"


def test_a_page_marked_all_visible_goes_along_where_its_map_changed() -> None:
    plain, marked = page(FIRST), bytearray(page(FIRST))
    marked[10] = 4  # PD_ALL_VISIBLE
    pages = plain + marked + plain + marked
    assert changed_pages(pages, 1 << 30) == b"\0\0\0\0"
    assert changed_pages(pages, 1 << 30, b"\0\0\1\1") == b"\0\0\0\1"


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("/base/5/16384", RelationSegment(1663, 5, 16384, 0)),
        ("/base/5/16384.12", RelationSegment(1663, 5, 16384, 12)),
        ("/pg_tblspc/16400/PG_15_202209061/5/16384.1", RelationSegment(16400, 5, 16384, 1)),
        ("/base/5/16384_vm", None),
        ("/base/5/16384_fsm.1", None),
        ("/base/5/16384_init", None),
        ("/base/5/t3_16384", None),
        ("/global/1262", None),
        ("/pg_xact/0000", None),
        ("/base/5/pg_filenode.map", None),
    ],
)
def test_only_main_forks_in_databases_are_taken_page_by_page(name: str, segment: RelationSegment | None) -> None:
    assert relation_segment(name) == segment
    assert is_paged(name, PAGE_BYTES) == (segment is not None)
    assert not is_paged(name, PAGE_BYTES + 1)
    assert not is_paged(name, 0)


@pytest.mark.parametrize(
    ("mtime", "recorded", "left_out"),
    [
        (1000, 1000, True),
        (1000, 1001, False),
        (1000, None, False),
        (10**18, 10**18, False),
        (10**18 - CLOCK_MARGIN_NS, 10**18 - CLOCK_MARGIN_NS, False),
        (10**18 - CLOCK_MARGIN_NS - 1, 10**18 - CLOCK_MARGIN_NS - 1, True),
    ],
)
def test_a_file_is_left_out_if_its_time_is_the_same_and_older_than_the_parent(
    mtime: int, recorded: int | None, left_out: bool
) -> None:
    assert may_be_left_out(mtime, recorded, 10**18) == left_out
