"""Pages as PostgreSQL would write them, one at a time and plainly."""

import struct

from agent.domain.page import PAGE_BYTES

_BASES = (
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
)  # fmt: skip


def plain_checksum(page: bytes, block: int) -> int:
    """Return the checksum of a page, word by word."""
    words = list(struct.unpack("<2048I", page))
    words[2] &= 0xFFFF0000
    sums = list(_BASES)
    for number, word in enumerate([*words, *[0] * 64]):
        mixed = sums[number % 32] ^ word
        sums[number % 32] = (mixed * 16777619 & 0xFFFFFFFF) ^ (mixed >> 17)
    folded = block
    for value in sums:
        folded ^= value
    return folded % 65535 + 1


def make_page(block: int, *, lsn: int = 0x1000028, fill: bytes = b"row") -> bytes:
    """Return an initialised page with a right checksum."""
    head = struct.pack("<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 4, 28, 8000, 8192, 8192 | 4, 0)
    page = bytearray((head + b"\0" * 4 + fill).ljust(PAGE_BYTES, b"\x11"))
    struct.pack_into("<H", page, 8, plain_checksum(bytes(page), block))
    return bytes(page)


def unchecked_page(lsn: int, fill: int = 0) -> bytes:
    """Return an initialised page without a checksum, filled with the byte `fill` % 256: quickly."""
    head = struct.pack("<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 24, 8192, 8192, 8192 | 4, 0)
    return head.ljust(PAGE_BYTES, bytes([fill % 256]))
