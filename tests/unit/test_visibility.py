"""Of a relation file, the blocks are found whose page of the visibility map changed."""

from itertools import compress
from pathlib import Path

from agent.backup.visibility import blocks_newly_mapped
from agent.domain.delta_file import RelationSegment
from tests.support.pages import unchecked_page

BLOCKS_OF_A_MAP_PAGE = 32_672
OLD, SINCE = 1 << 30, 1 << 31


def found(directory: Path, segment: int, blocks: int, blocks_per_segment: int) -> list[int]:
    path = directory / f"16384{f'.{segment}' if segment else ''}"
    relation = RelationSegment(1663, 5, 16384, segment)
    mapped = blocks_newly_mapped(str(path), relation, blocks, blocks_per_segment, SINCE)
    assert len(mapped) == blocks
    return list(compress(range(blocks), mapped))


def test_a_changed_page_of_the_map_stands_for_the_blocks_that_it_maps(tmp_path: Path) -> None:
    (tmp_path / "16384_vm").write_bytes(b"".join(map(unchecked_page, [OLD, SINCE, OLD])))
    begin, end = BLOCKS_OF_A_MAP_PAGE, 2 * BLOCKS_OF_A_MAP_PAGE
    assert found(tmp_path, 0, 50_000, 131_072) == list(range(begin, 50_000))
    assert found(tmp_path, 1, 40_000, 40_000) == list(range(end - 40_000))


def test_a_map_of_several_files_is_read_where_the_blocks_are(tmp_path: Path) -> None:
    (tmp_path / "16384_vm").write_bytes(unchecked_page(OLD))
    (tmp_path / "16384_vm.1").write_bytes(unchecked_page(SINCE))
    assert found(tmp_path, BLOCKS_OF_A_MAP_PAGE, 1, 1) == [0]
    assert found(tmp_path, BLOCKS_OF_A_MAP_PAGE - 1, 1, 1) == []


def test_without_a_map_no_block_is_marked(tmp_path: Path) -> None:
    assert found(tmp_path, 0, 100, 131_072) == []
    (tmp_path / "16384_vm").write_bytes(b"")
    assert found(tmp_path, 0, 100, 131_072) == []
