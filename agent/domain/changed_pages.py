"""Which pages of a relation file changed since a base backup, by what the pages themselves say.

A page carries the end of the last WAL record that changed it. Base backup start flushes everything older, so a page
whose LSN is before the parent's start LSN is in the parent as it is here, but for hints; see
`agent.backup.visibility` for the one that must not be missed.

Source: PageHeaderData and PageIsVerified() in PostgreSQL's src/include/storage/bufpage.h and bufpage.c; which pages
WAL-G takes: incremental_page_reader.go.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.domain.delta_file import PAGE_BYTES

_HEADER = np.dtype(
    {
        "names": ["lsn_high", "lsn_low", "flags", "lower", "upper", "special", "size_and_version"],
        "formats": ["<u4", "<u4", "<u2", "<u2", "<u2", "<u2", "<u2"],
        "offsets": [0, 4, 10, 12, 14, 16, 18],
        "itemsize": PAGE_BYTES,
    }
)
_HEADER_BYTES = 24
_KNOWN_FLAGS = 7  # PD_VALID_FLAG_BITS
_ALL_VISIBLE = 4  # PD_ALL_VISIBLE
_LAYOUT_VERSIONS = 5  # highest known; PG_PAGE_LAYOUT_VERSION is 4
# No WAL has a lower LSN: the first segment is number 1, and 1 MiB at least. Pages do: what initdb wrote, and a GiST
# index that PostgreSQL 14 to 16 built by sorting has the LSN 1 (GistBuildLSN). Such a page may have been written since
# the parent read it.
_FIRST_WAL_LSN = 1 << 20

Blocks: TypeAlias = NDArray[np.uint32]
"""Block numbers within one file, ascending."""


def changed_pages(pages: bytes | bytearray | memoryview, since_lsn: int) -> NDArray[np.bool_] | None:
    """Tell of each page in `pages`, a whole number of them, whether it may have changed at or after `since_lsn`.

    Returns:
        None if one of them is neither new nor begins as a page does: then this is no file of ordinary pages, or a
        damaged one, and nothing can be told from LSNs.
    """
    header = np.frombuffer(pages, dtype=_HEADER)
    upper, special = header["upper"], header["special"]
    is_new = upper == 0
    is_page = (header["flags"] <= _KNOWN_FLAGS) & (header["lower"] >= _HEADER_BYTES)
    is_page &= (header["lower"] <= upper) & (upper <= special) & (special <= PAGE_BYTES)
    is_page &= (header["size_and_version"] & 0xFF00) == PAGE_BYTES
    version = header["size_and_version"] & 0xFF
    is_page &= (version > 0) & (version <= _LAYOUT_VERSIONS)
    if not (is_new | is_page).all():
        return None
    lsn = header["lsn_high"].astype(np.uint64) << np.uint64(32) | header["lsn_low"]
    result: NDArray[np.bool_] = is_new | (lsn >= since_lsn) | (lsn < _FIRST_WAL_LSN)
    return result


def marked_all_visible(pages: bytes | bytearray | memoryview) -> NDArray[np.bool_]:
    """Tell of each page in `pages`, a whole number of them, whether VACUUM marked it all-visible."""
    result: NDArray[np.bool_] = (np.frombuffer(pages, dtype=_HEADER)["flags"] & _ALL_VISIBLE) != 0
    return result
