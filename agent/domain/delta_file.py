"""What a delta stores of a file: nothing, an increment, or all of it.

The rules are WAL-G's, narrowed where they can lose a change:

- A file of the same modification time is left out only if that time lies well before the parent began. A later one may
  have been written again in the same tick of the clock, after the parent had read it.
- Files of a database that was made after the parent began are stored whole. CREATE DATABASE may copy pages as they are,
  with LSNs from before the parent, and its OID may have been another's.

Source: tar_ball_file_packer.go and pagefile.go in WAL-G; GetFileBackupMethod() in PostgreSQL's
basebackup_incremental.c.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from agent.domain.page import PAGE_BYTES

Blocks: TypeAlias = Sequence[int]
"""Block numbers within one file, ascending."""

CLOCK_MARGIN_NS = 2 * 10**9
"""How far the clocks of the agent and of the file system may be apart, and the coarsest tick of the latter."""

_RELATION_SEGMENT = re.compile(r"/(?:base/(\d+)|pg_tblspc/(\d+)/PG_[^/]+/(\d+))/(\d+)(?:\.(\d+))?")
_DEFAULT_TABLESPACE = 1663  # DEFAULTTABLESPACE_OID in pg_tablespace.dat


@dataclass(frozen=True, slots=True)
class RelationSegment:
    """One file of a relation's main fork. `segment` is its place in the relation, from 0.

    Main forks only: the visibility map's pages change without an LSN of their own, the free space map's without WAL.
    """

    tablespace: int
    database: int
    relation: int
    segment: int


def relation_segment(name: str) -> RelationSegment | None:
    """Read the name of a tar member; None if it is no main fork in a database's directory."""
    match = _RELATION_SEGMENT.fullmatch(name)
    if match is None:
        return None
    in_base, tablespace, in_tablespace, relation, segment = match.groups()
    if in_base is not None:
        return RelationSegment(_DEFAULT_TABLESPACE, int(in_base), int(relation), int(segment or 0))
    return RelationSegment(int(tablespace), int(in_tablespace), int(relation), int(segment or 0))


def is_paged(name: str, size: int) -> bool:
    """Tell whether the file called `name`, of `size` bytes, can be stored as an increment."""
    return size > 0 and size % PAGE_BYTES == 0 and _RELATION_SEGMENT.fullmatch(name) is not None


def may_be_left_out(mtime_ns: int, parent_mtime_ns: int | None, parent_started_ns: int) -> bool:
    """Tell whether a file is in the parent as it is now. Times are nanoseconds since 1970.

    mtime_ns, parent_mtime_ns: its modification time now, and as the parent recorded it (None: it did not).
    parent_started_ns: when the parent began.
    """
    return mtime_ns == parent_mtime_ns and was_there_before(mtime_ns, parent_started_ns)


def was_there_before(mtime_ns: int, parent_started_ns: int) -> bool:
    """Tell whether what was last written at `mtime_ns` is surely older than the parent."""
    return mtime_ns < parent_started_ns - CLOCK_MARGIN_NS
