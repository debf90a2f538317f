"""WAL files in memory, for what reads them piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class WalBytes:
    """A `WalSource` with this content."""

    name: str
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def part(self, begin: int, end: int) -> bytes:
        return self.content[begin:end]

    def pieces(self) -> Iterator[memoryview]:
        view = memoryview(self.content)
        for begin in range(0, len(view), 100_000):
            yield view[begin : begin + 100_000]
