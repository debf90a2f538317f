"""Which pages a WAL record is about, and where in it their images and its own data lie.

Sources: XLogRecordBlockHeader and its followers in PostgreSQL's src/include/access/xlogrecord.h; DecodeXLogRecord() in
src/backend/access/transam/xlogreader.c. The same in versions 13 to 18 but for how a compressed image is marked.
"""

import struct
from typing import NamedTuple

from agent.domain.file_node import FILE_NODE, FileNode
from agent.domain.wal import MAGIC_BY_MAJOR
from agent.domain.wal_records import RECORD_HEADER_BYTES

PAGE_BYTES = 8192  # BLCKSZ of every official build

_BLOCK = struct.Struct("<BBH")  # id, fork and flags, bytes of data
_IMAGE = struct.Struct("<HHB")  # bytes, offset of the hole, flags
_COUNT = struct.Struct("<I")
_MAX_BLOCK_ID = 32
_HAS_IMAGE, _SAME_FILE = 0x10, 0x80
_HAS_HOLE = 0x01
_IS_COMPRESSED, _IS_COMPRESSED_UNTIL_14 = 0x1C, 0x02


class Block(NamedTuple):
    """A page that a record refers to.

    image_bytes: of the page's image, 0: none. hole: offset of the zeros that are left out of it, None if none are.
    is_compressed: then the image is not readable here.
    data_bytes: what the record has to say of this page beside an image.
    """

    file: FileNode
    number: int
    image_bytes: int
    hole: int | None
    is_compressed: bool
    data_bytes: int


class RecordParts(NamedTuple):
    """A record's pages, and where it lies in the record: the images and data of the pages, its own data."""

    blocks: list[Block]
    blocks_at: int
    main_at: int

    def image(self, data: bytes, block: Block) -> bytes | None:
        """Return the whole page whose image the record `data` holds; None if there is none, or it is compressed."""
        if not block.image_bytes or block.is_compressed:
            return None
        begin = self._begin(block)
        image = data[begin : begin + block.image_bytes]
        if block.hole is None:
            return image
        return image[: block.hole] + bytes(PAGE_BYTES - len(image)) + image[block.hole :]

    def data(self, data: bytes, block: Block) -> bytes:
        """Return what the record `data` says of the page beside its image."""
        begin = self._begin(block) + block.image_bytes
        return data[begin : begin + block.data_bytes]

    def _begin(self, block: Block) -> int:
        before = self.blocks[: self.blocks.index(block)]
        return self.blocks_at + sum(each.image_bytes + each.data_bytes for each in before)


def record_parts(data: bytes, magic: int) -> RecordParts:
    """Take the record `data`, found in WAL of this page magic, apart.

    Raises:
        ValueError: It is not as a record must be.
    """
    try:
        return _parts(data, _IS_COMPRESSED_UNTIL_14 if magic <= MAGIC_BY_MAJOR[14] else _IS_COMPRESSED)
    except (struct.error, IndexError):
        raise ValueError("the record is shorter than its headers say") from None


def _parts(data: bytes, compressed: int) -> RecordParts:
    position, main_bytes, file = RECORD_HEADER_BYTES, 0, None
    blocks: list[Block] = []
    payload = 0
    while position + payload < len(data):
        match data[position]:
            case id if id <= _MAX_BLOCK_ID:
                _id, flags, data_bytes = _BLOCK.unpack_from(data, position)
                position += _BLOCK.size
                image_bytes, hole, image_flags = 0, 0, 0
                if flags & _HAS_IMAGE:
                    image_bytes, hole, image_flags = _IMAGE.unpack_from(data, position)
                    has_both = image_flags & _HAS_HOLE and image_flags & compressed
                    position += _IMAGE.size + (2 if has_both else 0)
                if not flags & _SAME_FILE:
                    file = FileNode(*FILE_NODE.unpack_from(data, position))
                    position += FILE_NODE.size
                if file is None:
                    raise ValueError("the first block of a record names no file")
                (number,) = _COUNT.unpack_from(data, position)
                position += _COUNT.size
                payload += image_bytes + data_bytes
                blocks.append(
                    Block(
                        file, number, image_bytes,
                        hole if image_flags & _HAS_HOLE else None, bool(image_flags & compressed), data_bytes,
                    )
                )  # fmt: skip
            case 255:  # XLR_BLOCK_ID_DATA_SHORT
                main_bytes, position = data[position + 1], position + 2
                break
            case 254:  # XLR_BLOCK_ID_DATA_LONG
                (main_bytes,) = _COUNT.unpack_from(data, position + 1)
                position += 5
                break
            case 253:  # XLR_BLOCK_ID_ORIGIN
                position += 3
            case 252:  # XLR_BLOCK_ID_TOPLEVEL_XID
                position += 5
            case other:
                raise ValueError(f"{other} is no part of a record")
    if position + payload + main_bytes != len(data):
        raise ValueError("the record's length is not that of its parts")
    return RecordParts(blocks, position, len(data) - main_bytes)
