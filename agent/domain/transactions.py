"""What transactions did, from their WAL records: how much, to which relations, and whether something went away.

Sources: src/include/access/rmgrlist.h, heapam_xlog.h, src/include/catalog/storage_xlog.h and
src/include/commands/dbcommands_xlog.h in PostgreSQL; the opcodes are those of versions 13 to 18.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property

from agent.domain.file_node import FILE_NODE, FileNode
from agent.domain.lsn import format_lsn
from agent.domain.record_blocks import RecordParts, record_parts
from agent.domain.relation_names import PG_CLASS, RelationNames
from agent.domain.transaction_lists import transaction_lists
from agent.domain.wal import MAGIC_BY_MAJOR
from agent.domain.wal_records import RECORD_HEADER, RM_XACT, RecordKind, kind_of, main_data, parse_record

MANY_DELETED, MANY_UPDATED = 100, 1000
"""Rows that a transaction has to delete or update in one relation of a user to be marked for it."""

_RM_SMGR, _RM_DBASE, _RM_HEAP2, _RM_HEAP = 2, 4, 9, 10
_SMGR_CREATE = 0x10
_DBASE_DROP, _DBASE_DROP_UNTIL_14 = 0x20, 0x10
_OPCODE_MASK, _HEAP_OPCODE_MASK = 0xF0, 0x70
_INSERT, _DELETE, _UPDATE, _HOT_UPDATE, _HEAP_TRUNCATE = 0x00, 0x10, 0x20, 0x40, 0x30
_INPLACE, _MULTI_INSERT = 0x70, 0x50
_PG_DATABASE = FileNode(1664, 0, 1262)  # in pg_global; one of the files that nothing rewrites but VACUUM FULL


class Mark(StrEnum):
    """What somebody may be looking for, the worst first."""

    DROP_DATABASE = "DROP DATABASE"
    DROP = "DROP"
    TRUNCATE = "TRUNCATE"
    REWRITE = "REWRITE"  # VACUUM FULL, CLUSTER, REINDEX, REFRESH, ALTER TABLE, or TRUNCATE and new rows
    DELETE = "DELETE"
    UPDATE = "UPDATE"


@dataclass(slots=True)
class Rows:
    """Row versions that a transaction inserted, updated and deleted in one relation."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0


@dataclass(slots=True)
class _Work:
    """What was seen of a transaction that has not ended."""

    first_lsn: int
    records: int = 0
    wal_bytes: int = 0
    rows: dict[FileNode, Rows] = field(default_factory=dict)
    written: set[FileNode] = field(default_factory=set)
    created: set[FileNode] = field(default_factory=set)
    dropped_databases: list[int] = field(default_factory=list)
    truncates: bool = False

    def add(self, other: "_Work") -> None:
        """Count what a subtransaction did, too."""
        self.first_lsn = min(self.first_lsn, other.first_lsn)
        self.records += other.records
        self.wal_bytes += other.wal_bytes
        for file, rows in other.rows.items():
            mine = self.rows.setdefault(file, Rows())
            mine.inserted, mine.updated = mine.inserted + rows.inserted, mine.updated + rows.updated
            mine.deleted += rows.deleted
        self.written |= other.written
        self.created |= other.created
        self.dropped_databases += other.dropped_databases
        self.truncates |= other.truncates


@dataclass(frozen=True)
class EndedTransaction:
    """A transaction, or a subtransaction that was rolled back alone, and what the WAL that was read says of it.

    lsn: start of its commit or abort record. first_lsn: of its first record that was read; nothing that it did was
        done before.
    records, wal_bytes: its WAL that was read, that of its subtransactions included.
    rows: by relation file.
    created, dropped: relation files; those it made itself and dropped again are in neither.
    filled: those of `created` into which something was written.
    """

    xid: int
    time: datetime
    lsn: int
    commits: bool
    first_lsn: int
    records: int
    wal_bytes: int
    subtransactions: int
    rows: Mapping[FileNode, Rows]
    created: frozenset[FileNode]
    filled: frozenset[FileNode]
    dropped: tuple[FileNode, ...]
    dropped_databases: tuple[int, ...]
    truncates: bool

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """What stands out, the worst first. What an abort undid never does."""
        if not self.commits:
            return ()
        marks = [Mark.DROP_DATABASE] if self.dropped_databases else []
        marks += [] if self._replacement is None else [self._replacement]
        users = [rows for file, rows in self.rows.items() if not file.is_catalog]
        marks += [Mark.DELETE] if any(rows.deleted >= MANY_DELETED for rows in users) else []
        marks += [Mark.UPDATE] if any(rows.updated >= MANY_UPDATED for rows in users) else []
        return tuple(marks)

    @property
    def rank(self) -> int:
        """How much it stands out: 0 for the worst mark, the highest for none."""
        return list(Mark).index(self.marks[0]) if self.marks else len(Mark)

    @property
    def _replacement(self) -> Mark | None:
        """What became of the files that it dropped.

        All that make files anew lock the relation first, and so have an id by then: their new files are known. TRUNCATE
        adds no row to pg_class, as VACUUM FULL and its like do, and leaves the table's file empty; an index has a page.
        """
        if self.truncates:
            return Mark.TRUNCATE
        if not self.dropped:
            return None
        catalog = [rows for file, rows in self.rows.items() if file.number == PG_CLASS]
        adds_relations = any(rows.inserted for rows in catalog)
        if not self.created or (any(rows.deleted for rows in catalog) and not adds_relations):
            return Mark.DROP
        moves = {file.tablespace for file in self.created} != {file.tablespace for file in self.dropped}
        return Mark.REWRITE if adds_relations or moves or self.created == self.filled else Mark.TRUNCATE


class TransactionReader:
    """Takes records in order; tells of each transaction when it ends."""

    def __init__(self, magic: int) -> None:
        self.names = RelationNames(magic)
        self._magic = magic
        self._drop_database = _DBASE_DROP_UNTIL_14 if magic <= MAGIC_BY_MAJOR[14] else _DBASE_DROP
        self._open: dict[int, _Work] = {}
        # Rows of pg_database that were changed in place, by page and place: DROP DATABASE makes its row invalid before
        # it has an id, and deletes it then. Source: dropdb() in src/backend/commands/dbcommands.c.
        self._invalidated: dict[tuple[int, bytes], int] = {}

    def take(self, lsn: int, data: bytes) -> EndedTransaction | None:
        """Read the record `data` that begins at `lsn`; return the transaction that it ends, if it does.

        Raises:
            ValueError: It is damaged.
        """
        try:
            return self._take(lsn, data)
        except (struct.error, IndexError):
            raise ValueError(f"the record at {format_lsn(lsn)} is shorter than it must be") from None

    def _take(self, lsn: int, data: bytes) -> EndedTransaction | None:
        _total, xid, _link, info, manager, _crc = RECORD_HEADER.unpack_from(data)
        work = self._open.get(xid)
        if xid and work is None:
            work = self._open[xid] = _Work(lsn)
        if work is not None:
            work.records += 1
            work.wal_bytes += len(data)
        if manager == RM_XACT:
            ends = kind_of(info, manager) in (RecordKind.COMMIT, RecordKind.ABORT)
            return self._end(lsn, data, info) if ends else None
        parts = record_parts(data, self._magic)
        if any(block.file.number == PG_CLASS for block in parts.blocks):
            self.names.learn(xid, manager, info, data, parts)
        if manager == _RM_HEAP and info & _HEAP_OPCODE_MASK == _INPLACE and parts.blocks[0].file == _PG_DATABASE:
            row = parts.blocks[0].number, data[parts.main_at : parts.main_at + 2]  # xl_heap_inplace: offnum
            self._invalidated[row] = lsn
        if work is not None:
            self._note(work, manager, info, data, parts)
        return None

    def _note(self, work: _Work, manager: int, info: int, data: bytes, parts: RecordParts) -> None:
        work.written.update(block.file for block in parts.blocks)
        if manager == _RM_HEAP:
            self._note_heap(work, info & _HEAP_OPCODE_MASK, data, parts)
        elif manager == _RM_HEAP2 and info & _HEAP_OPCODE_MASK == _MULTI_INSERT:
            count = int.from_bytes(data[parts.main_at + 2 : parts.main_at + 4], "little")
            work.rows.setdefault(parts.blocks[0].file, Rows()).inserted += count
        elif manager == _RM_SMGR and info & _OPCODE_MASK == _SMGR_CREATE:
            work.created.add(FileNode(*FILE_NODE.unpack_from(data, parts.main_at)))
        elif manager == _RM_DBASE and info & _OPCODE_MASK == self._drop_database:
            work.dropped_databases.append(int.from_bytes(data[parts.main_at : parts.main_at + 4], "little"))

    def _note_heap(self, work: _Work, opcode: int, data: bytes, parts: RecordParts) -> None:
        if opcode == _HEAP_TRUNCATE:  # logged for logical decoding only
            work.truncates = True
        if not parts.blocks or opcode not in (_INSERT, _DELETE, _UPDATE, _HOT_UPDATE):
            return
        block = parts.blocks[0]
        if opcode == _DELETE and block.file == _PG_DATABASE:
            row = block.number, data[parts.main_at + 4 : parts.main_at + 6]  # xl_heap_delete: xmax, offnum
            work.first_lsn = min(work.first_lsn, self._invalidated.get(row, work.first_lsn))
        rows = work.rows.setdefault(block.file, Rows())
        rows.inserted += opcode == _INSERT
        rows.deleted += opcode == _DELETE
        rows.updated += opcode in (_UPDATE, _HOT_UPDATE)

    def _end(self, lsn: int, data: bytes, info: int) -> EndedTransaction | None:
        record = parse_record(data, len(data), lsn, lsn, self._magic)
        if record is None or record.time is None:
            return None
        lists = transaction_lists(info, main_data(data), self._magic)
        work = self._open.pop(record.xid, None) or _Work(lsn)
        for xid in lists.subtransactions:
            if (child := self._open.pop(xid, None)) is not None:
                work.add(child)
        created = frozenset(work.created - set(lists.dropped))
        dropped = tuple(file for file in lists.dropped if file not in work.created)
        return EndedTransaction(
            xid=record.xid,
            time=record.time,
            lsn=lsn,
            commits=record.kind is RecordKind.COMMIT,
            first_lsn=work.first_lsn,
            records=work.records,
            wal_bytes=work.wal_bytes,
            subtransactions=len(lists.subtransactions),
            rows=work.rows,
            created=created,
            filled=created & work.written,
            dropped=dropped,
            dropped_databases=tuple(work.dropped_databases),
            truncates=work.truncates,
        )
