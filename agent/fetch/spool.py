"""A directory for WAL segments that are downloaded before recovery asks for them.

It lies in pg_wal, so that a segment is put into its place by renaming it. Its content is made by this process: it is
emptied when the agent starts and when it stops. PostgreSQL takes no notice of it. Two agents of one server that both
use it cost each other repetitions, no segment.
The functions block for file I/O: call them in a thread.
"""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from agent.domain.wal import parse_segment_header

SPOOL_NAME = "pitr.spool"
# The kernel caches a write in units of its size. Where memory is full, those of 1 MiB have to be made by moving others.
_SLICE_BYTES = 256 << 10
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class Spool:
    """The spool of the data directory at `data_directory`."""

    def __init__(self, data_directory: Path) -> None:
        self.path = data_directory / "pg_wal" / SPOOL_NAME
        # Of this spool alone: another agent of the same server may fetch the same segment, and would cut our file.
        self._unfinished = f".{secrets.token_hex(8)}.part"

    def open(self) -> bool:
        """Make an empty spool; return whether there is one now.

        There is none where pg_wal is absent, cannot be written, or is another user's, who could not use our files.
        """
        try:
            if self.path.parent.stat().st_uid != os.geteuid():
                return False
            self.clear()
            self.path.mkdir(mode=0o700)
        except OSError:
            return False
        return True

    def clear(self) -> None:
        """Remove the spool and what is in it, if that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, name: str) -> "SpooledFile":
        """Begin the file of the segment `name`, under a name that `give` does not find."""
        return SpooledFile(self.path / name, self._unfinished)

    def discard(self, name: str) -> None:
        """Remove whatever there is of the segment `name`."""
        for path in (self.path / name, self.path / (name + self._unfinished)):
            path.unlink(missing_ok=True)

    def flush(self, name: str) -> None:
        """Write the segment `name` to disk, unless it is gone."""
        with contextlib.suppress(FileNotFoundError), (self.path / name).open("rb") as file:
            os.fdatasync(file.fileno())

    def give(self, name: str, destination: Path) -> None:
        """Move the segment `name` to `destination`, which must not exist and lies on the same file system."""
        os.link(self.path / name, destination, follow_symlinks=False)
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()


class SpooledFile:
    """A segment on its way into the spool; nothing is created before the first bytes are written."""

    def __init__(self, path: Path, unfinished: str) -> None:
        """`unfinished`: what is added to the name until it is complete."""
        self._path = path
        self._unfinished = path.with_name(path.name + unfinished)
        self._descriptor: int | None = None

    def write(self, data: bytes) -> None:
        """Append `data`."""
        if self._descriptor is None:
            self._descriptor = os.open(self._unfinished, _NEW_FILE, 0o600)
            _reserve(self._descriptor, data)
        view = memoryview(data)
        while view:  # a file system that fills up takes a part first
            view = view[os.write(self._descriptor, view[:_SLICE_BYTES]) :]

    def complete(self) -> None:
        """Let `give` find the segment."""
        self.close()
        self._unfinished.rename(self._path)

    def close(self) -> None:
        """Close the file; what is unfinished stays for `discard`."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _reserve(descriptor: int, start: bytes) -> None:
    """Give the file the size that the segment's header at its `start` announces, in one piece where that is possible.

    It makes writing cheaper, and a volume that is too full is noticed at once. A segment of another size than its
    header says is never handed out.
    """
    try:
        os.posix_fallocate(descriptor, 0, parse_segment_header(start).segment_bytes)
    except ValueError:
        pass  # not a segment: checking it will say so
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise
