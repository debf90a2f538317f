"""Increments are applied to exactly the pages they name, and refused unless they are whole."""

import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import DataObject, binary, data, integers, lists

from agent.domain.page import PAGE_BYTES
from agent.errors import RepositoryCorrupt
from agent.repository.increments import IncrementApplier


def increment(file_bytes: int, pages: dict[int, bytes]) -> bytes:
    head = b"wi1\x55" + struct.pack("<QI", file_bytes, len(pages))
    return head + struct.pack(f"<{len(pages)}I", *pages) + b"".join(pages.values())


def page(seed: int) -> bytes:
    return bytes([seed % 256]) * PAGE_BYTES


def apply(path: Path, content: bytes, *, cuts: list[int] | None = None, member_bytes: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        applier = IncrementApplier(descriptor, len(content) if member_bytes is None else member_bytes, "of a file")
        bounds = [0, *sorted(cuts or []), len(content)]
        for start, stop in pairwise(bounds):
            applier.write(memoryview(content)[start:stop])
        applier.finish()
    finally:
        os.close(descriptor)


@pytest.fixture
def relation(tmp_path: Path) -> Path:
    path = tmp_path / "16384"
    path.write_bytes(b"".join(page(number) for number in range(4)))
    return path


@given(data=data())
def test_pages_go_where_they_belong_however_the_increment_arrives(
    data: DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("increment") / "16384"
    old_pages, new_pages = data.draw(integers(0, 6)), data.draw(integers(0, 6))
    path.write_bytes(b"".join(page(number) for number in range(old_pages)))
    blocks = data.draw(lists(integers(0, max(0, new_pages - 1)), unique=True, max_size=new_pages))
    content = increment(new_pages * PAGE_BYTES, {block: page(100 + block) for block in sorted(blocks)})
    apply(path, content, cuts=data.draw(lists(integers(0, len(content)), max_size=5)))
    expected = [
        page(100 + number) if number in blocks else page(number) if number < old_pages else bytes(PAGE_BYTES)
        for number in range(new_pages)
    ]
    assert path.read_bytes() == b"".join(expected)


def test_an_increment_without_pages_still_sets_the_size(relation: Path) -> None:
    apply(relation, increment(2 * PAGE_BYTES, {}))
    assert relation.read_bytes() == page(0) + page(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"wi2\x55" + bytes(12), "known version"),
        (increment(PAGE_BYTES, {1: page(1)}), "beyond the end"),
        (increment(1 << 60, {}), "does not fit"),
        (increment(PAGE_BYTES, {0: page(1)})[:-1], "does not fit"),
        (increment(PAGE_BYTES, {0: page(1)}) + b"x", "does not fit"),
        (b"wi1", "cut short"),
        (b"", "cut short"),
    ],
)
def test_a_broken_increment_is_refused(relation: Path, content: bytes, said: str) -> None:
    with pytest.raises(RepositoryCorrupt, match=said):
        apply(relation, content)


def test_an_increment_that_stops_early_is_refused(relation: Path) -> None:
    content = increment(4 * PAGE_BYTES, {0: page(9), 1: page(9)})
    with pytest.raises(RepositoryCorrupt, match="cut short"):
        apply(relation, content[:-PAGE_BYTES], member_bytes=len(content))
    with pytest.raises(RepositoryCorrupt, match="goes on"):
        apply(relation, content + b"x", member_bytes=len(content))


@given(content=binary(max_size=200))
def test_no_bytes_at_all_break_the_applier(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("increment") / "16384"
    path.write_bytes(page(0))
    with pytest.raises(RepositoryCorrupt):
        apply(path, content[:16] + content)
