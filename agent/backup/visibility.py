"""Which heap pages VACUUM may have marked all-visible since a base backup without giving them a new LSN.

It sets a flag in the heap page and a bit in the visibility map, with one WAL record, whose LSN the map's page gets; the
heap page gets it only where hint bits are in WAL: with data checksums or wal_log_hints. A delta holds the map whole.
With the bit but without the flag, the next change of the page leaves the bit: index-only scans then return rows that
were deleted. So where the map's page changed, every page with the flag belongs into the delta.

Source: visibilitymap_set() and visibilitymap_clear() in PostgreSQL's visibilitymap.c, heap_xlog_visible().
"""

import os
from pathlib import Path

from agent.domain.delta_file import RelationSegment
from agent.domain.page import PAGE_BYTES, changed_pages

_HEAP_BLOCKS = (PAGE_BYTES - 24) * 4  # HEAPBLOCKS_PER_PAGE: two bits each, behind the page header


def blocks_newly_mapped(
    path: str, segment: RelationSegment, blocks: int, blocks_per_segment: int, since_lsn: int
) -> bytes:
    """Tell of each of the `blocks` of the relation file `path` whether the map's page for it changed since `since_lsn`:
    a byte each, 1 or 0.

    blocks_per_segment: blocks in each of a relation's files but the last.

    Raises:
        OSError: The map could not be read. Without a map nothing is marked.
    """
    result = b""
    first = segment.segment * blocks_per_segment
    end = first + blocks
    while first < end:
        number = first // _HEAP_BLOCKS
        map_segment, block = divmod(number, blocks_per_segment)
        map_path = Path(path).with_name(f"{segment.relation}_vm{f'.{map_segment}' if map_segment else ''}")
        mapped = min(end, (number + 1) * _HEAP_BLOCKS) - first
        result += bytes([_has_changed(map_path, block, since_lsn)]) * mapped
        first += mapped
    return result


def _has_changed(path: Path, block: int, since_lsn: int) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        page = os.pread(descriptor, PAGE_BYTES, block * PAGE_BYTES)
    finally:
        os.close(descriptor)
    if len(page) < PAGE_BYTES:
        return False
    changed = changed_pages(page, since_lsn)
    return changed is None or changed == b"\1"
