"""WAL files in memory, for what reads them piece by piece; and the records of several."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.domain.wal_records import WalRecord
from agent.domain.wal_scan import RecordJoiner, SegmentScan


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


def join_records(scans: Iterable[SegmentScan]) -> Iterator[WalRecord]:
    """Yield the records of interest in consecutive segments, as a `RecordJoiner` finds them."""
    joiner = RecordJoiner()
    for scan in scans:
        yield from joiner.take(scan)
