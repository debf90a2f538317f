"""Which pages of a file are in place, while it is put together from a chain of base backups, the newest first.

So each page is written once, in its newest version. A page takes a bit: 16 KiB of memory for a file of 1 GiB.
"""

from collections.abc import Iterator

from agent.domain.page import PAGE_BYTES


class WrittenPages:
    """The pages of one file of `file_bytes` bytes. Older base backups add only what is wanted still."""

    def __init__(self, file_bytes: int) -> None:
        self._bitmap = bytearray((-(-file_bytes // PAGE_BYTES) + 7) // 8)
        self._limit = file_bytes

    @property
    def are_all(self) -> bool:
        """Whether older base backups have nothing to add."""
        whole, rest = divmod(-(-self._limit // PAGE_BYTES), 8)
        if self._bitmap.count(0xFF, 0, whole) != whole:
            return False
        mask = (1 << rest) - 1
        return not rest or self._bitmap[whole] & mask == mask

    def add(self, block: int) -> bool:
        """Tell whether the page `block` is wanted still; it is not, from now on."""
        if not self.is_wanted(block):
            return False
        self._bitmap[block >> 3] |= 1 << (block & 7)
        return True

    def cut(self, file_bytes: int) -> None:
        """Take note of an older state that has been applied and had `file_bytes`: nothing before it reaches further."""
        self._limit = min(self._limit, file_bytes)

    def finish(self) -> None:
        """Take note that the whole file of an older base backup has been added: nothing is wanted any more."""
        self._bitmap = bytearray()
        self._limit = 0

    def is_wanted(self, block: int) -> bool:
        """Tell whether the page `block` is wanted still."""
        return block * PAGE_BYTES < self._limit and not self._bitmap[block >> 3] & 1 << (block & 7)

    def wanted_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield what of the bytes from `start` to `stop` is wanted still, as pairs of start and stop, ascending."""
        stop = min(stop, self._limit)
        begun: int | None = None
        while start < stop:
            block = start // PAGE_BYTES
            if self.is_wanted(block):
                begun = start if begun is None else begun
            elif begun is not None:
                yield begun, start
                begun = None
            start = (block + 1) * PAGE_BYTES
        if begun is not None:
            yield begun, stop
