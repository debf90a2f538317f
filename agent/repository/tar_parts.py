"""Writes the tars of a base backup, a file after the other, straight through codec and cipher into bounded chunks.

Members are as WAL-G writes them: names begin with a slash, directories without one at the end; only regular files and
directories; headers are USTAR where that suffices, PAX where it does not. A member is as long as its header says: a
file that has grown since is cut, one that has shrunk is filled with zeros, and WAL replay repairs both.

Memory of one part being packed: 1 MiB read, 1 MiB plus one codec block (at most 4 MiB) of output, and the codec's own
(see `Codec.compressor`), below 16 MiB in all; plus the names of its members, at most a few hundred bytes each.

The generators block for files and compression: run them in a thread (`in_threads`).
"""

import os
import stat
import tarfile
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping

from agent.errors import BackupFailed
from agent.postgres.data_files import DataFile, refused
from agent.repository.object_format import ObjectFormat
from agent.tasks import in_thread

_BLOCK_BYTES = 512
_END_OF_ARCHIVE = bytes(2 * _BLOCK_BYTES)
_READ_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_STEP_BYTES = 8 << 20  # input after which a chunk is handed out even if it is short: a thread cannot be cancelled


class _Member(tarfile.TarInfo):
    """A header whose directory name keeps no slash at its end: names are compared with `files_metadata.json`."""

    def get_info(self) -> Mapping[str, str | int | bytes | Mapping[str, str]]:
        return {**super().get_info(), "name": self.name}


def member_header(
    name: str, size: int, mode: int, *, mtime: int = 0, uid: int = 0, gid: int = 0, directory: bool = False
) -> bytes:
    """Return the header blocks of a member; `mode` are permission bits, `mtime` seconds since 1970."""
    member = _Member(name)
    member.size, member.mode, member.mtime, member.uid, member.gid = size, mode, mtime, uid, gid
    member.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK_BYTES)


def small_tar(members: Mapping[str, tuple[int, bytes]], objects: ObjectFormat) -> bytes:
    """Return a whole packed tar of small members: name to mode and content. Blocks for compression only."""
    pieces = [
        piece
        for name, (mode, content) in members.items()
        for piece in (member_header(name, len(content), mode), content, _padding(len(content)))
    ]
    return objects.encode(b"".join([*pieces, _END_OF_ARCHIVE]))


class TarPart:
    """One tar part: what went into it so far.

    members: name and modification time (ns since 1970) of each. content_bytes: sum of their sizes. catalog_bytes: the
    same with the sizes of directories. done_bytes: content packed so far. vanished: names of files that were gone when
    they were to be read.
    """

    def __init__(self, name: str, objects: ObjectFormat) -> None:
        self.name = name
        self.members: list[tuple[str, int]] = []
        self.content_bytes = 0
        self.catalog_bytes = 0
        self.done_bytes = 0
        self.vanished: list[str] = []
        self._encoder = objects.encoder()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._taken_bytes = 0

    def pack(self, files: Iterator[DataFile], threshold: int) -> Generator[bytes, None, None]:
        """Take from `files` until the content exceeds `threshold` bytes, or they end; yield the packed tar in chunks.

        A chunk may be empty. A file is never split, so that a part may be larger by one file.

        Raises:
            BackupFailed: A file cannot be read, or one is gone that must not be missing.
        """
        for file in files:
            yield from self._add(file)
            yield from self._due()
            if self.content_bytes > threshold:
                break
        self._put(_END_OF_ARCHIVE)
        self._hold(self._encoder.flush())
        yield self._take()

    def _add(self, file: DataFile) -> Iterator[bytes]:
        if file.is_directory:
            self._begin(file, file.status)
            return
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            if not file.may_vanish:
                raise refused(file.path, error) from error
            self.vanished.append(file.name)
            return
        except OSError as error:
            raise refused(file.path, error) from error
        try:
            yield from self._content(file, descriptor)
        except OSError as error:
            raise refused(file.path, error) from error
        finally:
            os.close(descriptor)

    def _content(self, file: DataFile, descriptor: int) -> Iterator[bytes]:
        status = os.fstat(descriptor)  # size and time of what is read, should the name have a new file by now
        if not stat.S_ISREG(status.st_mode):
            raise BackupFailed(f"{file.path} is no longer a regular file")
        self._begin(file, status)
        missing = status.st_size
        while missing and (piece := os.read(descriptor, min(_READ_BYTES, missing))):
            missing -= len(piece)
            self._put(piece)
            self.done_bytes += len(piece)
            yield from self._due()
        while missing:
            zeros = bytes(min(_READ_BYTES, missing))
            missing -= len(zeros)
            self._put(zeros)
            self.done_bytes += len(zeros)
            yield from self._due()
        self._put(_padding(status.st_size))

    def _begin(self, file: DataFile, status: os.stat_result) -> None:
        size = 0 if file.is_directory else status.st_size
        self._put(
            member_header(
                file.name, size, stat.S_IMODE(status.st_mode), mtime=status.st_mtime_ns // 10**9,
                uid=status.st_uid, gid=status.st_gid, directory=file.is_directory,
            )
        )  # fmt: skip
        self.members.append((file.name, status.st_mtime_ns))
        self.content_bytes += size
        self.catalog_bytes += status.st_size

    def _due(self) -> Iterator[bytes]:
        if self._pending_bytes >= _CHUNK_BYTES or self._taken_bytes >= _STEP_BYTES:
            yield self._take()

    def _put(self, piece: bytes) -> None:
        self._taken_bytes += len(piece)
        self._hold(self._encoder.encode(piece))

    def _hold(self, packed: bytes) -> None:
        self._pending.append(packed)
        self._pending_bytes += len(packed)

    def _take(self) -> bytes:
        chunk = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = self._taken_bytes = 0
        return chunk


async def in_threads(
    chunks: Generator[bytes, None, None], after_each: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the non-empty `chunks`, each made in a thread when it is asked for; call `after_each` after every one.

    Asking is the back-pressure: nothing is read from the disk before the store has taken what was read last. To be
    closed (`contextlib.aclosing`), which closes `chunks` and the file it may have open.
    """
    try:
        while (chunk := await in_thread(next, chunks, None)) is not None:
            after_each()
            if chunk:
                yield chunk
    finally:
        chunks.close()
