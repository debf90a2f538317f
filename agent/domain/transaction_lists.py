"""What a commit or abort record lists beside its time: subtransactions, and relation files that go away.

Source: xl_xact_xinfo and its followers in PostgreSQL's src/include/access/xact.h; ParseCommitRecord() and
ParseAbortRecord() in src/backend/access/rmgrdesc/xactdesc.c.
"""

import struct
from dataclasses import dataclass

from agent.domain.file_node import FILE_NODE, FileNode
from agent.domain.wal import MAGIC_BY_MAJOR

_TIME_BYTES = 8
_COUNT = struct.Struct("<I")
_HAS_INFO = 0x80  # in xl_info
_HAS_DATABASE, _HAS_TWOPHASE = 1 << 0, 1 << 4
_SUBTRANSACTIONS, _FILES, _STATISTICS, _INVALIDATIONS = 1 << 1, 1 << 2, 1 << 8, 1 << 3


@dataclass(frozen=True, slots=True)
class TransactionLists:
    """What was read.

    subtransactions: ids of those that end with it.
    dropped: files of which nothing is left when a commit is done, of an abort: those that the transaction had made.
    prepared_xid: of the prepared transaction that is ended, 0 if it was none.
    """

    subtransactions: tuple[int, ...] = ()
    dropped: tuple[FileNode, ...] = ()
    prepared_xid: int = 0


def transaction_lists(info: int, main: bytes, magic: int) -> TransactionLists:
    """Read the record's own data `main`, up to where it is cut short.

    Args:
        info: xl_info.
        main: The data, see `main_data`; of a very long record the end may be missing.
        magic: Of the WAL pages: tells the version.

    Raises:
        struct.error: Not even what stands before the lists is there.
    """
    if not info & _HAS_INFO:
        return TransactionLists()
    (flags,) = _COUNT.unpack_from(main, _TIME_BYTES)
    position = _TIME_BYTES + _COUNT.size + (8 if flags & _HAS_DATABASE else 0)
    lists: dict[int, bytes] = {}
    # Dropped statistics are listed since 15; xl_xact_stats_item has a 64-bit object id since 18.
    statistics_bytes = 16 if magic == MAGIC_BY_MAJOR[18] else 12
    for flag, item_bytes in (
        (_SUBTRANSACTIONS, _COUNT.size),
        (_FILES, FILE_NODE.size),
        (_STATISTICS, statistics_bytes),
        (_INVALIDATIONS, 16),
    ):
        if flags & flag and position + _COUNT.size <= len(main):
            (count,) = _COUNT.unpack_from(main, position)
            begin, position = position + _COUNT.size, position + _COUNT.size + count * item_bytes
            lists[flag] = main[begin:position][: (len(main) - begin) // item_bytes * item_bytes]
    has_xid = flags & _HAS_TWOPHASE and position + _COUNT.size <= len(main)
    return TransactionLists(
        tuple(xid for (xid,) in _COUNT.iter_unpack(lists.get(_SUBTRANSACTIONS, b""))),
        tuple(FileNode(*item) for item in FILE_NODE.iter_unpack(lists.get(_FILES, b""))),
        int(_COUNT.unpack_from(main, position)[0]) if has_xid else 0,
    )
