"""Verifies the page checksums of relation files while a base backup reads them.

A page may be read while the server writes it, half old and half new. So one that looks wrong is read again, and is
corrupt only if the same wrong bytes come twice.
"""

import os
import time
from dataclasses import dataclass

import structlog

from agent.domain.backup_file import CorruptBlocks
from agent.domain.control_file import ControlFile
from agent.domain.page import PAGE_BYTES, wrong_pages

_TRIES = 10
_PAUSE_SECONDS = 0.005
_PATIENT_BLOCKS = 20  # of a file with more corrupt blocks than this nobody waits for each

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PageRules:
    """Which pages of a running server must have a right checksum: those not written since the backup's `start_lsn`.

    segment_blocks: blocks in each of a relation's files but the last.
    """

    start_lsn: int
    segment_blocks: int

    def wrong(self, pages: bytes, segment: int, block: int) -> list[int]:
        """Return the positions of the wrong ones of `pages`, which begin at `block` of a relation's file `segment`."""
        return wrong_pages(pages, segment * self.segment_blocks + block, self.start_lsn)


def page_rules(control: ControlFile, start_lsn: int) -> PageRules | None:
    """Return the rules for the pages that a base backup begun at `start_lsn` reads; None if they have no checksums."""
    if not control.data_checksums or control.block_bytes != PAGE_BYTES:
        return None
    return PageRules(start_lsn, control.relation_segment_blocks)


class PageCheck:
    """Verifies the pages of one relation file, open as `descriptor`: number `segment` of its relation."""

    def __init__(self, rules: PageRules, path: str, descriptor: int, segment: int) -> None:
        self.corrupt = CorruptBlocks()
        self._rules = rules
        self._path = path
        self._descriptor = descriptor
        self._segment = segment

    def verified(self, pages: bytes, offset: int) -> bytes:
        """Return `pages`, read from `offset` of the file, with those read again that were caught half written.

        What follows the last whole page is no page and not looked at.
        """
        first = offset // PAGE_BYTES
        wrong = self._rules.wrong(pages, self._segment, first)
        if not wrong:
            return pages
        mended = bytearray(pages)
        for position in wrong:
            place = slice(position * PAGE_BYTES, (position + 1) * PAGE_BYTES)
            mended[place] = self._read_again(pages[place], first + position)
        return bytes(mended)

    def _read_again(self, page: bytes, block: int) -> bytes:
        for attempt in range(_TRIES):
            if attempt and self.corrupt.count < _PATIENT_BLOCKS:
                time.sleep(_PAUSE_SECONDS)
            before = page
            # A file that has become shorter meanwhile ends in what is to be taken for zeros.
            page = os.pread(self._descriptor, PAGE_BYTES, block * PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
            if not self._rules.wrong(page, self._segment, block):
                return page
            if page == before and attempt:
                break
        self.corrupt = self.corrupt.and_these([block])
        return page

    def tell(self) -> None:
        """Log what was found, once all is read."""
        if self.corrupt.count:
            log.error(
                "corrupt pages in a relation file",
                path=self._path,
                pages=self.corrupt.count,
                first_blocks=list(self.corrupt.some),
            )
