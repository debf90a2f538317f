"""WAL-G's increments: what a delta backup stores of a relation file that changed.

    offset   size    field
    0        4       "wi1" 0x55
    4        8       size of the file when it was backed up
    12       4       N, number of pages
    16       4*N     their block numbers within this file, ascending
    16+4*N   8192*N  the pages, in the same order

Source: pagefile.go in WAL-G's internal/databases/postgres.
"""

import os
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Protocol

from agent.domain.page import PAGE_BYTES
from agent.errors import RepositoryCorrupt

_HEAD = struct.Struct("<4sQI")
_MAGIC = b"wi1\x55"
_MAX_PAGES = 1 << 22  # 32 GiB: far above the 1 GiB of a file, unless PostgreSQL was built --with-segsize


def increment_bytes(pages: int) -> int:
    """Return the size of an increment of so many pages."""
    return _HEAD.size + pages * (4 + PAGE_BYTES)


def increment_head(file_bytes: int, blocks: bytes) -> bytes:
    """Return what an increment begins with; the pages are to follow.

    file_bytes: size of the file now; the applied increment cuts or extends it to that.
    blocks: the pages' block numbers within the file, ascending, each a little-endian 32-bit number.
    """
    return _HEAD.pack(_MAGIC, file_bytes, len(blocks) // 4) + blocks


class PageChoice(Protocol):
    """Chooses which pages of an increment are written."""

    def add(self, block: int, /) -> bool:
        """Tell whether the page `block` is to be written."""


class IncrementReader:
    """Reads one increment of `member_bytes`, taken in pieces; `source` is what messages call it.

    The calls raise `RepositoryCorrupt` if it is no whole increment. What becomes of it is for a derived class to say.
    """

    def __init__(self, member_bytes: int, source: str) -> None:
        self._member_bytes = member_bytes
        self._source = source
        self._need = _HEAD.size
        self._buffer = bytearray()
        self._next: Callable[[], None] = self._read_head
        self._page_data_taken = 0
        self.blocks = array("I")
        """The block numbers of its pages, once they are read."""
        self.file_bytes = 0
        """The size that the file had, once it is read."""

    def _begin(self) -> None:
        """Called once `blocks` and `file_bytes` are known."""

    def _page(self, block: int, in_page: int, data: memoryview) -> None:
        """Called with bytes of the page `block`, from `in_page` of it on; they do not reach beyond it."""

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data):
            if not self._need:
                self._take_pages(data)
                return
            count = min(self._need - len(self._buffer), len(data))
            self._buffer += data[:count]
            data = data[count:]
            if len(self._buffer) == self._need:
                self._next()

    def finish(self) -> None:
        """Return if the increment was whole."""
        if self._need or self._page_data_taken != len(self.blocks) * PAGE_BYTES:
            raise self._corrupt("is cut short")

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the increment {self._source} {problem}", hint="Use another backup, or bring back a copy of the object."
        )

    def _read_head(self) -> None:
        magic, self.file_bytes, count = _HEAD.unpack(self._buffer)
        if magic != _MAGIC:
            raise self._corrupt("does not begin as one of a known version")
        if self.file_bytes > _MAX_PAGES * PAGE_BYTES or self._member_bytes != increment_bytes(count):
            raise self._corrupt(f"has {self._member_bytes} bytes, which does not fit its {count} pages")
        self._buffer.clear()
        self._need, self._next = 4 * count, self._read_blocks
        if not count:
            self._read_blocks()

    def _read_blocks(self) -> None:
        self.blocks.frombytes(self._buffer)
        if sys.byteorder == "big":
            self.blocks.byteswap()
        if self.blocks and (max(self.blocks) + 1) * PAGE_BYTES > self.file_bytes:
            raise self._corrupt("has a page beyond the end of the file")
        self._buffer.clear()
        self._need = 0
        self._begin()

    def _take_pages(self, data: memoryview) -> None:
        while len(data):
            index, in_page = divmod(self._page_data_taken, PAGE_BYTES)
            if index == len(self.blocks):
                raise self._corrupt("goes on after its last page")
            count = min(PAGE_BYTES - in_page, len(data))
            self._page(self.blocks[index], in_page, data[:count])
            self._page_data_taken += count
            data = data[count:]


class IncrementApplier(IncrementReader):
    """Applies an increment to the file open for writing as `descriptor`.

    Without `choose` the file gets the size that it had, and each page its place. `choose` is called with that size when
    it is known: the size of the file is then left alone, and only the pages that are chosen are written.

    The calls block for file I/O; they raise `OSError`, too.
    """

    def __init__(
        self, descriptor: int, member_bytes: int, source: str, choose: Callable[[int], PageChoice] | None = None
    ) -> None:
        super().__init__(member_bytes, source)
        self._descriptor = descriptor
        self._choose = choose
        self._choice: PageChoice | None = None
        self._is_chosen = False

    def _begin(self) -> None:
        if self._choose is None:
            os.ftruncate(self._descriptor, self.file_bytes)
        else:
            self._choice = self._choose(self.file_bytes)

    def _page(self, block: int, in_page: int, data: memoryview) -> None:
        if not in_page:
            self._is_chosen = self._choice is None or self._choice.add(block)
        if self._is_chosen:
            write_at(self._descriptor, data, block * PAGE_BYTES + in_page)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; raise `OSError`."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
