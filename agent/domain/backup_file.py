"""What a base backup holds of one file."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_SOME_BLOCKS = 10  # as many as WAL-G lists


class MemberKind(Enum):
    """How a file is in a base backup: whole, as an increment of the parent's file, or only in the parent."""

    WHOLE = "whole"
    INCREMENT = "increment"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class CorruptBlocks:
    """Blocks of one file whose checksum is wrong: how many, and the first of their numbers within the file."""

    count: int = 0
    some: tuple[int, ...] = ()

    def and_these(self, blocks: Sequence[int]) -> "CorruptBlocks":
        """Return these blocks and `blocks`, which come after them."""
        return CorruptBlocks(self.count + len(blocks), (*self.some, *blocks)[:_SOME_BLOCKS])


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file or directory that has been read for a base backup.

    name: of its tar member. mtime_ns: modification time before it was read, nanoseconds since 1970.
    file_bytes: size of the file as it was read, 0 for a directory.
    crc32c: of the whole file as a restore makes it; None for a directory, and where not all of it was read.
    """

    name: str
    mtime_ns: int
    kind: MemberKind = MemberKind.WHOLE
    is_directory: bool = False
    file_bytes: int = 0
    crc32c: int | None = None
    corrupt: CorruptBlocks = CorruptBlocks()
