"""Names of relations, as far as WAL shows rows of pg_class: best effort, for people.

The first change of a page after a checkpoint logs the whole page, and a new row is logged as such. So whoever drops a
table mostly logs the page that names it: with the row that is deleted, and its neighbours.

Sources: FormData_pg_class in PostgreSQL's src/include/catalog/pg_class.h, the part that is the same in versions 13 to
18; HeapTupleHeaderData in access/htup_details.h; PageHeaderData in storage/bufpage.h; xl_heap_header in heapam_xlog.h.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from agent.domain.file_node import FileNode
from agent.domain.record_blocks import PAGE_BYTES, RecordParts

PG_CLASS = 1259
"""Its file number, until somebody rewrites it. Source: RelationRelationId."""

_ROW = struct.Struct("<I64s5I I")  # oid, relname, namespace, type, oftype, owner, am; relfilenode
_KIND_OFFSETS = (115, 119)  # relkind: until 17, and since 18
_KINDS = {
    "r": "table", "i": "index", "t": "TOAST table", "m": "materialized view", "S": "sequence",
}  # fmt: skip
_PAGE_HEADER_BYTES = 24
_LOWER_OFFSET = 12
_LINE_POINTER = struct.Struct("<I")
_NORMAL = 1
_TUPLE_HEADER_BYTES = 23  # SizeofHeapTupleHeader
_TUPLE_XMIN = struct.Struct("<I")
_HEADER_SIZE_OFFSET = 22  # t_hoff
_HEAP, _INSERT, _OPERATION_MASK = 10, 0x00, 0x70
_REWRITTEN = re.compile(r"pg_temp_(\d+)")  # what a rewrite calls a table until the files are swapped, with its OID
_HEAP_HEADER_BYTES = 5  # xl_heap_header, whose last byte is t_hoff


class Relation(NamedTuple):
    """What pg_class says of a relation file: `kind` in words, `name` without its schema."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class RelationNames:
    """Collects them from records; asked by file."""

    def __init__(self, magic: int) -> None:
        self._kind_offset = _KIND_OFFSETS[magic >= 0xD118]
        self._found: dict[tuple[int, int], tuple[int, Relation]] = {}
        self._by_oid: dict[tuple[int, int], tuple[int, Relation]] = {}

    def get(self, file: FileNode) -> Relation | None:
        """Return what the file `file` belongs to, None if no row told it."""
        known = self._found.get((file.database, file.number))
        if known is not None and (rewritten := _REWRITTEN.fullmatch(known[1].name)):
            known = self._by_oid.get((file.database, int(rewritten[1])))
        return known and known[1]

    def learn(self, xid: int, manager: int, info: int, data: bytes, parts: RecordParts) -> None:
        """Look at a record that is about pages of pg_class."""
        for index, block in enumerate(parts.blocks):
            if block.file.number != PG_CLASS:
                continue
            page = parts.image(data, block)
            rows = [] if page is None else list(_rows_on(page))
            if page is None and not index and manager == _HEAP and info & _OPERATION_MASK == _INSERT:
                said = parts.data(data, block)
                if len(said) > _HEAP_HEADER_BYTES:
                    skipped = said[_HEAP_HEADER_BYTES - 1] - _TUPLE_HEADER_BYTES
                    rows = [(xid, said[_HEAP_HEADER_BYTES + skipped :])]
            for inserted_by, row in rows:
                self._keep(block.file.database, inserted_by, row)

    def _keep(self, database: int, inserted_by: int, row: bytes) -> None:
        if len(row) <= self._kind_offset:
            return
        oid, raw, *_others, number = _ROW.unpack_from(row)
        kind = _KINDS.get(chr(row[self._kind_offset]))
        if not number or not kind:
            return
        relation = Relation(kind, raw.partition(b"\0")[0].decode(errors="backslashreplace"))
        for table, key in ((self._found, number), (self._by_oid, oid)):
            known = table.get((database, key))
            # A relation that was renamed has several rows: the last one counts. Ids go round.
            if known is None or (inserted_by - known[0]) % (1 << 32) < 1 << 31:
                table[database, key] = inserted_by, relation


def _rows_on(page: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the id that inserted it and the columns of each row on a heap page, dead ones too."""
    lower = int.from_bytes(page[_LOWER_OFFSET : _LOWER_OFFSET + 2], "little")
    if len(page) != PAGE_BYTES or not _PAGE_HEADER_BYTES <= lower <= PAGE_BYTES:
        return
    whole = (lower - _PAGE_HEADER_BYTES) // _LINE_POINTER.size * _LINE_POINTER.size
    for (pointer,) in _LINE_POINTER.iter_unpack(page[_PAGE_HEADER_BYTES : _PAGE_HEADER_BYTES + whole]):
        offset, state, length = pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17
        item = page[offset : offset + length]
        if state == _NORMAL and len(item) > _TUPLE_HEADER_BYTES:
            yield _TUPLE_XMIN.unpack_from(item)[0], item[item[_HEADER_SIZE_OFFSET] :]
