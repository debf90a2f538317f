"""Rules for the pages of a relation, many at once: which are wrong, which have changed.

They are computed in C (`page.c`), without the interpreter's lock. All take consecutive pages of `PAGE_BYTES` each,
little-endian as PostgreSQL writes them on x86-64 and arm64; what follows the last whole page is not looked at.

Source: PageHeaderData and PageIsVerified() in PostgreSQL's src/include/storage/bufpage.h and bufpage.c;
pg_checksum_page() in checksum_impl.h.
"""

import ctypes
from importlib.util import find_spec
from itertools import compress

PAGE_BYTES = 8192

_LIBRARY = "pitr_page"


def _load() -> ctypes.CDLL:
    """Load the library from where the build hook installs it, among the packages: as if it were a module there."""
    found = find_spec(_LIBRARY)
    if found is None or found.origin is None:
        raise ImportError(f"{_LIBRARY}.so is missing: install postgres-pitr (pip install), which compiles it")
    return ctypes.CDLL(found.origin)


_library = _load()
_library.wrong_pages.argtypes = (
    *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint64),
    ctypes.c_char_p,
)
_library.wrong_pages.restype = ctypes.c_size_t
_library.changed_pages.argtypes = (
    *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64),
    *(ctypes.c_char_p, ctypes.c_char_p),
)
_library.changed_pages.restype = ctypes.c_bool


def wrong_pages(pages: bytes, first_block: int, start_lsn: int) -> list[int]:
    """Return the positions in `pages` of those that a base backup begun at `start_lsn` should not hold.

    `first_block`: the block number of the first page, within its relation.

    They have a wrong checksum, or were never initialised and are not empty. A page with a later LSN is left alone:
    it may have been read while it was written, and WAL replay writes it anew, whatever it holds.
    Source: sendFile() in PostgreSQL's basebackup.c.
    """
    count = len(pages) // PAGE_BYTES
    is_wrong = ctypes.create_string_buffer(count)
    if not _library.wrong_pages(pages, count, first_block, start_lsn, is_wrong):
        return []
    return list(compress(range(count), is_wrong.raw[:count]))


def changed_pages(pages: bytes, since_lsn: int, is_mapped: bytes | None = None) -> bytes | None:
    """Tell of each page whether it may have changed at or after `since_lsn`: a byte each, 1 or 0.

    A page carries the end of the last WAL record that changed it. Base backup start flushes everything older, so a page
    whose LSN is before the parent's start LSN is in the parent as it is here, but for hints; see
    `agent.backup.visibility` for the one that must not be missed: pages marked all-visible, of those that `is_mapped`
    has a 1 for, have changed, too.

    Returns:
        None if one of them is neither new nor begins as a page does: then this is no file of ordinary pages, or a
        damaged one, and nothing can be told from LSNs.

    Source: which pages WAL-G takes: incremental_page_reader.go.
    """
    count = len(pages) // PAGE_BYTES
    is_changed = ctypes.create_string_buffer(count)
    if not _library.changed_pages(pages, count, since_lsn, is_mapped, is_changed):
        return None
    return is_changed.raw
