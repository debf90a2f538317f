"""Which blocks changed, by the WAL summaries of PostgreSQL 17 and later.

A summary says of a stretch of WAL which blocks of which relations it changed, and of a relation that was made, dropped
or truncated in it the shortest length it had ("limit block"). With summaries from the parent's start LSN to the new
base backup's, blocks that did not change need not even be read.

Source: GetFileBackupMethod() and PrepareForIncrementalBackup() in PostgreSQL's basebackup_incremental.c; the rows are
those of pg_wal_summary_contents().
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.domain.delta_file import Blocks, RelationSegment
from agent.domain.timeline import Stretch

MAX_BLOCKS = 8 << 20
"""Most changed blocks that are kept: 64 MiB of memory, for 64 GiB of changed pages."""

_Keys = NDArray[np.uint64]  # of one database in one tablespace: relation << 32 | block, ascending, once each
_RELATION_SHIFT = 32


@dataclass(frozen=True, slots=True, order=True)
class WalSummary:
    """One summary that the server has: of the WAL of `timeline` from `start_lsn` up to `end_lsn`."""

    timeline: int
    start_lsn: int
    end_lsn: int


def covering(
    available: Iterable[WalSummary], path: Sequence[Stretch], start_lsn: int, end_lsn: int
) -> list[WalSummary] | None:
    """Return the summaries of the WAL on `path` from `start_lsn` up to `end_lsn`, or None if they leave a gap."""
    result: list[WalSummary] = []
    held = sorted(available)
    for stretch in path:
        position = max(stretch.from_lsn, start_lsn)
        end = end_lsn if stretch.to_lsn is None else min(stretch.to_lsn, end_lsn)
        for summary in held:
            if summary.timeline == stretch.timeline and summary.end_lsn > position and summary.start_lsn < end:
                if summary.start_lsn > position:
                    return None
                result.append(summary)
                position = summary.end_lsn
        if position < end:
            return None
    return result


class ChangedBlocks:
    """The blocks that the summaries name. First all are added, then `seal`, then it is asked, by any thread."""

    def __init__(self) -> None:
        self._added: dict[tuple[int, int], array[int]] = {}
        self._keys: dict[tuple[int, int], _Keys] = {}
        self._limits: dict[tuple[int, int, int], int] = {}
        self._made: set[tuple[int, int]] = set()
        self._count = 0

    def add(self, tablespace: int, database: int, relation: int, blocks: bytes) -> bool:
        """Add changed blocks of a relation's main fork, big-endian numbers of 64 bits each, counted from its beginning.

        Returns:
            False if there are more than `MAX_BLOCKS`: then reading all pages costs less than remembering them.
        """
        keys = np.frombuffer(blocks, ">u8").astype(np.uint64) | np.uint64(relation << _RELATION_SHIFT)
        self._added.setdefault((tablespace, database), array("Q")).frombytes(keys.tobytes())
        self._count += len(keys)
        return self._count <= MAX_BLOCKS

    def add_limit(self, tablespace: int, database: int, relation: int, block: int) -> None:
        """Add that a relation had only `block` blocks at some time; relation 0: the database itself was made."""
        if relation == 0:
            self._made.add((tablespace, database))
        key = (tablespace, database, relation)
        self._limits[key] = min(block, self._limits.get(key, block))

    def __len__(self) -> int:
        """How many blocks they are, once sealed."""
        return sum(len(keys) for keys in self._keys.values())

    def seal(self) -> None:
        """Make it ready to be asked."""
        self._keys = {key: np.unique(np.frombuffer(added, np.uint64)) for key, added in self._added.items()}
        self._added.clear()

    def of(self, file: RelationSegment, blocks: int, blocks_per_segment: int) -> Blocks | None:
        """Return the blocks of `file`, which is `blocks` long, that an increment must hold; None: store it whole.

        blocks_per_segment: blocks in each of a relation's files but the last.
        """
        if (file.tablespace, file.database) in self._made:
            return None
        first = file.segment * blocks_per_segment
        limit = self._limits.get((file.tablespace, file.database, file.relation))
        if limit is not None and limit <= first:
            return None
        changed = self._between(file, first, first + blocks)
        if limit is not None and limit < first + blocks:
            # Cut there and grown again: where the parent had other pages, nothing of them may remain.
            low = limit - first
            changed = array("I", (*(block for block in changed if block < low), *range(low, blocks)))
        return changed

    def _between(self, file: RelationSegment, start: int, stop: int) -> Blocks:
        keys = self._keys.get((file.tablespace, file.database))
        if keys is None:
            return array("I")
        base = file.relation << _RELATION_SHIFT
        low, high = np.searchsorted(keys, np.array([base + start, base + stop], np.uint64))
        return array("I", (keys[low:high] - np.uint64(base + start)).astype(np.uint32).tobytes())
