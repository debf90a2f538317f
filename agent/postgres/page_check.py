"""Verifies the page checksums of relation files while a base backup reads them.

A page may be read while the server writes it, half old and half new. So one that looks wrong is read again, and is
corrupt only if the same wrong bytes come twice.
"""

import os
import threading
import time
from collections.abc import Sequence
from itertools import accumulate

import structlog

from agent.domain.backup_file import CorruptBlocks
from agent.domain.control_file import ControlFile

PAGE_BYTES = 8192
_SOME_BLOCKS = 10  # as many as WAL-G lists
_TRIES = 10
_PAUSE_SECONDS = 0.005
_PATIENT_BLOCKS = 20  # of a file with more corrupt blocks than this nobody waits for each

log = structlog.get_logger()


_ONE_AT_A_TIME = threading.Lock()
"""Held while numpy works: it lets go of the interpreter hundreds of times a call, and threads that take turns at that
spend half of their time on it."""


class PageRules:
    """Which pages of a running server must have a right checksum: those not written since the backup's `start_lsn`.

    numpy is imported when the first of these is made, because it takes 15 MiB and a tenth of a second: make it in a
    thread.
    """

    def __init__(self, control: ControlFile, start_lsn: int) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which would start one for each CPU of the node
        from agent.domain.page import wrong_pages

        self._wrong_pages = wrong_pages
        self._start_lsn = start_lsn
        self._segment_blocks = control.relation_segment_blocks

    def wrong(self, files: Sequence[tuple[bytes, int, int]]) -> list[list[int]]:
        """Return for each of `files` the positions of its wrong pages.

        Each is pages, the number of the file within its relation, and the block in it that the first page is. What
        follows the last whole page is not looked at.
        """
        counts = [len(pages) // PAGE_BYTES for pages, _, _ in files]
        blocks = [
            segment * self._segment_blocks + block + position
            for (_, segment, block), count in zip(files, counts, strict=True)
            for position in range(count)
        ]
        whole = [memoryview(pages)[: count * PAGE_BYTES] for (pages, _, _), count in zip(files, counts, strict=True)]
        with _ONE_AT_A_TIME:
            found = self._wrong_pages(whole[0] if len(whole) == 1 else b"".join(whole), blocks, self._start_lsn)
        ends = list(accumulate(counts))
        return [
            [position - end + count for position in found if end - count <= position < end] if found else []
            for end, count in zip(ends, counts, strict=True)
        ]


class PageCheck:
    """Verifies the pages of one relation file, open as `descriptor`: number `segment` of its relation."""

    def __init__(self, rules: PageRules, path: str, descriptor: int, segment: int) -> None:
        self.corrupt = CorruptBlocks()
        self.rules = rules
        self._path = path
        self._descriptor = descriptor
        self.segment = segment

    def verified(self, pages: bytes, offset: int) -> bytes:
        """Return `pages`, read from `offset` of the file, with those read again that were caught half written.

        What follows the last whole page is no page and not looked at.
        """
        first = offset // PAGE_BYTES
        return self.mended(pages, first, self.rules.wrong([(pages, self.segment, first)])[0])

    def verified_runs(self, runs: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """As `verified`, of runs of pages, each with its first block within the file: one call for all."""
        wrong = self.rules.wrong([(pages, self.segment, first) for first, pages in runs]) if runs else []
        return [self.mended(pages, first, found) for (first, pages), found in zip(runs, wrong, strict=True)]

    @staticmethod
    def verified_together(files: "Sequence[tuple[PageCheck, bytes]]") -> list[bytes]:
        """Return the contents of whole files of one backup, verified in one call, which is as quick as for one."""
        if not files:
            return []
        wrong = files[0][0].rules.wrong([(content, check.segment, 0) for check, content in files])
        return [check.mended(content, 0, pages) for (check, content), pages in zip(files, wrong, strict=True)]

    def mended(self, pages: bytes, first: int, wrong: Sequence[int]) -> bytes:
        """Return `pages`, from block `first` of the file, with those at the `wrong` positions read again."""
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
            if not self.rules.wrong([(page, self.segment, block)])[0]:
                return page
            if page == before and attempt:
                break
        self._note(block)
        return page

    def _note(self, block: int) -> None:
        known = self.corrupt
        self.corrupt = CorruptBlocks(known.count + 1, (*known.some, block)[:_SOME_BLOCKS])

    def tell(self) -> None:
        """Log what was found, once all is read."""
        if self.corrupt.count:
            log.error(
                "corrupt pages in a relation file",
                path=self._path,
                pages=self.corrupt.count,
                first_blocks=list(self.corrupt.some),
            )
