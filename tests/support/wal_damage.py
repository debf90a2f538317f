"""Ways in which WAL is damaged."""

from collections.abc import Callable, Iterable

from agent.domain.wal import WAL_PAGE_BYTES

Damage = tuple[Callable[[bytearray, int, int], None], int, int]
"""What is done, where, and with what value from 1 to 255."""


def damaged(content: bytes, damage: Iterable[Damage]) -> bytes:
    """Return `content` after all of `damage`."""
    result = bytearray(content)
    for change, at, value in damage:
        change(result, at, value)
    return bytes(result)


def flip(content: bytearray, at: int, value: int) -> None:
    """Flip the bits of `value` in one byte."""
    content[at] ^= value


def overwrite(content: bytearray, at: int, value: int) -> None:
    """Write `value` over eight bytes."""
    content[at : at + 8] = bytes([value]) * len(content[at : at + 8])


def cut_to_zeros(content: bytearray, at: int, _value: int) -> None:
    """Leave nothing but zeros from there on."""
    content[at:] = bytes(len(content) - at)


def copy_a_page(content: bytearray, at: int, value: int) -> None:
    """Write another page over the page there."""
    page, other = (n % (len(content) // WAL_PAGE_BYTES) * WAL_PAGE_BYTES for n in (at, at + value))
    content[page : page + WAL_PAGE_BYTES] = content[other : other + WAL_PAGE_BYTES]
