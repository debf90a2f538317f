"""Reads files of a running server for a base backup: what of each goes into its tar.

`WholeFile` is the plain case: the file as it is. Whatever else implements `FileContent` (an increment, a file that is
only mentioned) is packed and recorded alike. Everything here blocks for file I/O: call it in a thread.
"""

import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import google_crc32c

from agent.domain.backup_file import CorruptBlocks, MemberKind
from agent.errors import BackupFailed
from agent.postgres.data_files import DataFile, refused

READ_BYTES = 1 << 20
"""Most bytes of a file that are held at once."""


class FileContent(Protocol):
    """One file, open for reading. To be closed.

    kind: how it will be in the backup. status: of the file that was opened, should its name have a new one by now.
    member_bytes: size of its tar member, 0 if it is skipped. crc32c and corrupt: see `PackedFile`; valid when `pieces`
    has ended.
    """

    kind: MemberKind
    status: os.stat_result
    member_bytes: int
    crc32c: int | None
    corrupt: CorruptBlocks

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the member's content, of at most `READ_BYTES` each and exactly `member_bytes` in all.

        A piece is valid until the next one is asked for.
        """

    def close(self) -> None:
        """Close the file."""


OpenContent: TypeAlias = Callable[[DataFile], FileContent | None]
"""Opens a file of the backup, and decides what of it goes into the tar; None if it vanished and may have.

Called by several threads at once. Raises `BackupFailed` if the file cannot be read.
"""


def open_regular(file: DataFile) -> tuple[int, os.stat_result] | None:
    """Open `file`; return its descriptor and status, or None if it vanished and may have.

    Raises:
        BackupFailed: It cannot be read, must not be missing, or is no longer a regular file.
    """
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        if not file.may_vanish:
            raise refused(file.path, error) from error
        return None
    except OSError as error:
        raise refused(file.path, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BackupFailed(f"{file.path} is no longer a regular file")
    return descriptor, status


class WholeFile:
    """A file as it is, as long as it was when it was opened.

    What has grown since is cut, what has shrunk is filled with zeros; WAL replay repairs both.
    """

    kind = MemberKind.WHOLE
    corrupt = CorruptBlocks()

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        self.status = status
        self.member_bytes = status.st_size
        self.crc32c: int | None = None
        self._descriptor = descriptor

    @classmethod
    def open(cls, file: DataFile) -> "WholeFile | None":
        """Implements `OpenContent`."""
        opened = open_regular(file)
        return None if opened is None else cls(*opened)

    def pieces(self) -> Iterator[bytes]:
        """As `FileContent`."""
        missing, crc32c = self.member_bytes, 0
        while missing:
            piece = os.read(self._descriptor, min(READ_BYTES, missing)) or bytes(min(READ_BYTES, missing))
            crc32c = google_crc32c.extend(crc32c, piece)
            missing -= len(piece)
            yield piece
        self.crc32c = crc32c

    def close(self) -> None:
        """As `FileContent`."""
        os.close(self._descriptor)
