"""Sets of file names that take eight bytes a name: two million files are 16 MB, not a gigabyte.

A name is a path below the data directory, and stands here for 64 bits of its digest: of two million names one pair has
the same with a probability of one in ten million, and then a restore stops, because a file arrives twice.
"""

import hashlib
from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray


def digest_of(name: str) -> int:
    """Return the 64 bits that stand for `name`."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class FileNames:
    """Names with positions 0 to n - 1, by which others keep what they know of a file."""

    def __init__(self, digests: "array[int]") -> None:
        """Hold the names with these digests, each once. `digests` (of 64 bits, in any order) is not kept."""
        import numpy as np  # not for those who restore nothing

        self._sorted = array("Q", np.unique(np.frombuffer(digests, np.uint64)).tobytes() if digests else b"")

    def __len__(self) -> int:
        return len(self._sorted)

    def position(self, name: str) -> int | None:
        """Return the position of `name`, None if it is none of these."""
        return self.position_of(digest_of(name))

    def position_of(self, digest: int) -> int | None:
        """Return the position of the name with this digest, None if it is none of these."""
        position = bisect_left(self._sorted, digest)
        return position if position < len(self._sorted) and self._sorted[position] == digest else None

    def digest(self, position: int) -> int:
        """Return the digest of the name at `position`."""
        return self._sorted[position]

    def positions(self, digests: "array[int]") -> "NDArray[int64]":
        """Return the position of each digest, -1 for those that are none of these."""
        import numpy as np

        names, wanted = np.frombuffer(self._sorted, np.uint64), np.frombuffer(digests, np.uint64)
        if not len(names):
            return np.full(len(wanted), -1, np.int64)
        found = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
        return np.where(names[found] == wanted, found, -1)
