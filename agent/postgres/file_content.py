"""Reads files of a running server for a base backup: what of each goes into its tar.

`WholeFiles` is the plain case: the file as it is. Whatever else implements `FileContent` (an increment, a file that is
only mentioned) is packed and recorded alike. Everything here blocks for file I/O: call it in a thread.
"""

import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import google_crc32c

from agent.domain.backup_file import CorruptBlocks, MemberKind
from agent.errors import BackupFailed
from agent.postgres.data_files import DataFile, refused, relation_file_number
from agent.postgres.page_check import PageCheck, PageRules

READ_BYTES = 2 << 20
"""Most bytes of a file that are held at once."""


class FileContent(Protocol):
    """One file, open for reading. To be closed.

    kind: how it will be in the backup. status: of the file that was opened, should its name have a new one by now.
    member_bytes: size of its tar member, 0 if it is skipped. crc32c and corrupt: see `PackedFile`; valid when `pieces`
    has ended. scanned_bytes: what was read of it already, to find out what is to be stored.
    """

    kind: MemberKind
    status: os.stat_result
    member_bytes: int
    scanned_bytes: int
    crc32c: int | None
    corrupt: CorruptBlocks

    def pieces(self) -> Iterator[bytes]:
        """Yield the member's content, of at most `READ_BYTES` each and exactly `member_bytes` in all."""

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
    """A file as it is, as long as it was when it was opened; `check` verifies its pages.

    What has grown since is cut, what has shrunk is filled with zeros; WAL replay repairs both.
    """

    kind = MemberKind.WHOLE

    def __init__(self, descriptor: int, status: os.stat_result, check: PageCheck | None = None) -> None:
        self.status = status
        self.member_bytes = status.st_size
        self.scanned_bytes = 0
        self.crc32c: int | None = None
        self.corrupt = CorruptBlocks()
        self._descriptor = descriptor
        self._check = check

    def pieces(self) -> Iterator[bytes]:
        """As `FileContent`."""
        crc32c = 0
        for offset in range(0, self.member_bytes, READ_BYTES):
            piece = self._verified(offset, min(READ_BYTES, self.member_bytes - offset))
            crc32c = google_crc32c.extend(crc32c, piece)
            yield piece
        self.crc32c = crc32c
        if self._check is not None:
            self._check.tell()
            self.corrupt = self._check.corrupt

    def _verified(self, offset: int, size: int) -> bytes:
        piece = self._read(offset, size)
        return piece if self._check is None else self._check.verified(piece, offset)

    def _read(self, offset: int, size: int) -> bytes:
        piece = os.pread(self._descriptor, size, offset)
        return piece if len(piece) == size else piece + self._rest(offset + len(piece), size - len(piece))

    def _rest(self, offset: int, size: int) -> bytes:
        rest = b""
        while len(rest) < size and (piece := os.pread(self._descriptor, size - len(rest), offset + len(rest))):
            rest += piece
        return rest.ljust(size, b"\0")

    def close(self) -> None:
        """As `FileContent`."""
        os.close(self._descriptor)


class WholeFiles:
    """Opens every file of the backup whole. `rules`: those for its pages, None if they have no checksums."""

    def __init__(self, rules: PageRules | None) -> None:
        self._rules = rules

    def open(self, file: DataFile) -> WholeFile | None:
        """Implements `OpenContent`."""
        opened = open_regular(file)
        if opened is None:
            return None
        descriptor, status = opened
        segment = relation_file_number(file.name)
        if self._rules is None or segment is None:
            return WholeFile(descriptor, status)
        return WholeFile(descriptor, status, PageCheck(self._rules, file.path, descriptor, segment))
