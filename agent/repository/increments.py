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
from collections.abc import Callable

from agent.domain.delta_file import PAGE_BYTES
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


class IncrementApplier:
    """Applies one increment of `member_bytes`, taken in pieces, to the file open for writing as `descriptor`.

    The file gets the size that it had, and each page its place. `source` is what messages call the increment. The calls
    block for file I/O; they raise `RepositoryCorrupt` if it is no whole increment, and `OSError`.
    """

    def __init__(self, descriptor: int, member_bytes: int, source: str) -> None:
        self._descriptor = descriptor
        self._member_bytes = member_bytes
        self._source = source
        self._need = _HEAD.size
        self._buffer = bytearray()
        self._next: Callable[[], None] = self._read_head
        self._blocks: tuple[int, ...] = ()
        self._file_bytes = 0
        self._page_data_taken = 0

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data):
            if not self._need:
                self._write_pages(data)
                return
            count = min(self._need - len(self._buffer), len(data))
            self._buffer += data[:count]
            data = data[count:]
            if len(self._buffer) == self._need:
                self._next()

    def finish(self) -> None:
        """Return if the increment was whole."""
        if self._need or self._page_data_taken != len(self._blocks) * PAGE_BYTES:
            raise self._corrupt("is cut short")

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the increment {self._source} {problem}", hint="Use another backup, or bring back a copy of the object."
        )

    def _read_head(self) -> None:
        magic, self._file_bytes, count = _HEAD.unpack(self._buffer)
        if magic != _MAGIC:
            raise self._corrupt("does not begin as one of a known version")
        if self._file_bytes > _MAX_PAGES * PAGE_BYTES or self._member_bytes != increment_bytes(count):
            raise self._corrupt(f"has {self._member_bytes} bytes, which does not fit its {count} pages")
        os.ftruncate(self._descriptor, self._file_bytes)
        self._buffer.clear()
        self._need, self._next = 4 * count, self._read_blocks

    def _read_blocks(self) -> None:
        self._blocks = struct.unpack(f"<{len(self._buffer) // 4}I", self._buffer)
        if any((block + 1) * PAGE_BYTES > self._file_bytes for block in self._blocks):
            raise self._corrupt("has a page beyond the end of the file")
        self._buffer.clear()
        self._need = 0

    def _write_pages(self, data: memoryview) -> None:
        while len(data):
            index, in_page = divmod(self._page_data_taken, PAGE_BYTES)
            if index == len(self._blocks):
                raise self._corrupt("goes on after its last page")
            count = min(PAGE_BYTES - in_page, len(data))
            offset = self._blocks[index] * PAGE_BYTES + in_page
            written = os.pwrite(self._descriptor, data[:count], offset)
            self._page_data_taken += written
            data = data[written:]
