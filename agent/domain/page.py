"""Pages of a relation, many at once: their LSNs and checksums.

Everything takes consecutive pages of `PAGE_BYTES` each, little-endian as PostgreSQL writes them on x86-64 and arm64.

Source: PageHeaderData in PostgreSQL's src/include/storage/bufpage.h; pg_checksum_page() in checksum_impl.h.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 8192

Words: TypeAlias = npt.NDArray[np.uint32]

_SUMS = 32  # parallel FNV-1a sums
_PRIME = np.uint32(16777619)
_SHIFT = np.uint32(17)
_BASES = np.array([
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
], np.uint32)  # fmt: skip


def page_checksums(pages: bytes | bytearray | memoryview, blocks: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Return the checksum that each page should have; `blocks`: the block number of each, within its relation."""
    return _checksums(_words(pages), blocks)


def page_lsns(pages: bytes | bytearray | memoryview) -> npt.NDArray[np.uint64]:
    """Return the LSN of each page's last change, 0 for a new page."""
    words = _words(pages)
    return (words[:, 0, 0].astype(np.uint64) << np.uint64(32)) | words[:, 0, 1]


def wrong_pages(pages: bytes | bytearray | memoryview, blocks: Sequence[int], start_lsn: int) -> list[int]:
    """Return the positions in `pages` of those that a base backup begun at `start_lsn` should not hold.

    `blocks`: the block number of each page, within its relation.

    They have a wrong checksum, or were never initialised and are not empty. A page with a later LSN is left alone:
    it may have been read while it was written, and WAL replay writes it anew, whatever it holds.
    Source: sendFile() in PostgreSQL's basebackup.c.
    """
    words = _words(pages)
    is_new = words[:, 0, 3] < 0x10000  # pd_upper is 0
    checked = ~is_new & (page_lsns(pages) < start_lsn)
    stored = words[:, 0, 2] & np.uint32(0xFFFF)
    wrong = checked & (_checksums(words, blocks) != stored)
    wrong |= is_new & words.any(axis=(1, 2)) if is_new.any() else False
    return [int(position) for position in np.flatnonzero(wrong)]


def _words(pages: bytes | bytearray | memoryview) -> Words:
    return np.frombuffer(pages, np.dtype("<u4")).reshape(-1, PAGE_BYTES // 4 // _SUMS, _SUMS)


def _checksums(words: Words, blocks: Sequence[int]) -> Words:
    sums = np.tile(_BASES, (len(words), 1))
    shifted = np.empty_like(sums)
    first = words[:, 0].copy()
    first[:, 2] &= np.uint32(0xFFFF0000)  # the checksum itself counts as 0
    _mix(sums, first, shifted)
    for row in range(1, words.shape[1]):
        _mix(sums, words[:, row], shifted)
    for _ in range(2):
        _mix(sums, None, shifted)
    folded: Words = np.bitwise_xor.reduce(sums, axis=1) ^ np.array(blocks, np.uint32)
    return folded % np.uint32(65535) + np.uint32(1)


def _mix(sums: Words, row: Words | None, shifted: Words) -> None:
    """Take one word into each of the sums, in place; None stands for zeros. `shifted` is scratch space."""
    if row is not None:
        np.bitwise_xor(sums, row, out=sums)
    np.right_shift(sums, _SHIFT, out=shifted)
    np.multiply(sums, _PRIME, out=sums)
    np.bitwise_xor(sums, shifted, out=sums)
