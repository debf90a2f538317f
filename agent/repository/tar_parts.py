"""Writes the tars of a base backup, a file after the other, straight through codec and cipher into bounded chunks.

Members are as WAL-G writes them: names begin with a slash, directories without one at the end; only regular files and
directories; headers are USTAR where that suffices, PAX where it does not.

Memory of one part being packed, `PACKING_BYTES` at most: what is read, 2 MiB plus one codec block (at most 4 MiB) of
output, the codec's own (see `Codec.compressor`), and a few hundred bytes for each of its files.

The generators block for files and compression: run them in a thread (`in_threads`).
"""

import os
import stat
import tarfile
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from concurrent.futures import Executor

from agent.domain.backup_file import MemberKind, PackedFile
from agent.postgres.data_files import DataFile, refused
from agent.postgres.file_content import FileContent, OpenContent
from agent.repository.object_format import ObjectFormat
from agent.tasks import in_thread

_BLOCK_BYTES = 512
_END_OF_ARCHIVE = bytes(2 * _BLOCK_BYTES)
_USTAR_NAME_BYTES = 100
_USTAR_LIMITS = (8**7, 8**7, 8**7, 8**11, 8**11)  # of mode, uid, gid, size, time
_USTAR_REST = b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
_USTAR_REST_SUM = sum(_USTAR_REST) + 8 * ord(" ")  # the checksum counts its own field as spaces
_CHUNK_BYTES = 1 << 20
_GATHERED_BYTES = 256 << 10  # small members are compressed together: a call for each would cost more than its work
MAX_FILES = 16384
"""A part is closed after so many files, however small they are: their names are kept until it is stored."""

PACKING_BYTES = 24 << 20
"""What one part being packed takes of memory, at most."""

_STEP_BYTES = 8 << 20  # input after which a chunk is handed out even if it is short: a thread cannot be cancelled


class _Member(tarfile.TarInfo):
    """A header whose directory name keeps no slash at its end: names are compared with `files_metadata.json`."""

    def get_info(self) -> Mapping[str, str | int | bytes | Mapping[str, str]]:
        return {**super().get_info(), "name": self.name}


def member_header(
    name: str, size: int, mode: int, *, mtime: int = 0, uid: int = 0, gid: int = 0, directory: bool = False
) -> bytes:
    """Return the header blocks of a member; `mode` are permission bits, `mtime` seconds since 1970."""
    numbers = (mode, uid, gid, size, mtime)
    is_plain = name.isascii() and len(name) <= _USTAR_NAME_BYTES
    if is_plain and all(0 <= number < limit for number, limit in zip(numbers, _USTAR_LIMITS, strict=True)):
        return _ustar_header(name, numbers, tarfile.DIRTYPE if directory else tarfile.REGTYPE)
    member = _Member(name)
    member.size, member.mode, member.mtime, member.uid, member.gid = size, mode, mtime, uid, gid
    member.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _ustar_header(name: str, numbers: tuple[int, int, int, int, int], kind: bytes) -> bytes:
    """Return what `tarfile` would, in a tenth of the time: a cluster has many small files."""
    start = name.encode().ljust(_USTAR_NAME_BYTES, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % numbers
    return start + b"%06o\0 " % (sum(start) + kind[0] + _USTAR_REST_SUM) + kind + _USTAR_REST


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK_BYTES)


def small_tar(members: Mapping[str, bytes], objects: ObjectFormat) -> bytes:
    """Return a whole packed tar of small members, by their names. Blocks for compression only."""
    pieces = [
        piece
        for name, content in members.items()
        for piece in (member_header(name, len(content), 0o600), content, _padding(len(content)))
    ]
    return objects.encode(b"".join([*pieces, _END_OF_ARCHIVE]))


class TarPart:
    """One tar part: what went into it so far.

    files: what was read for it, also files that are only mentioned. content_bytes: sum of the members' sizes.
    catalog_bytes: the sizes of what they were made of, directories too. done_bytes: sizes of files dealt with so far.
    read_bytes: what was read of them.
    vanished: names of files that were gone when they were to be read.
    """

    def __init__(self, name: str, objects: ObjectFormat, open_content: OpenContent) -> None:
        self.name = name
        self.files: list[PackedFile] = []
        self.content_bytes = 0
        self.catalog_bytes = 0
        self.done_bytes = 0
        self.read_bytes = 0
        self.vanished: list[str] = []
        self._open_content = open_content
        self._encoder = objects.encoder(apart=True)
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._taken_bytes = 0

    def pack(self, files: Iterator[DataFile], threshold: int) -> Generator[bytes, None, None]:
        """Take from `files` until the content exceeds `threshold` bytes, or they end; yield the packed tar in chunks.

        It also ends after `MAX_FILES`. A chunk may be empty. A file is never split, so a part may be larger by one.

        Raises:
            BackupFailed: A file cannot be read, or one is gone that must not be missing.
        """
        for file in files:
            yield from self._add(file)
            if self.content_bytes > threshold or len(self.files) >= MAX_FILES:
                break
        self._put(_END_OF_ARCHIVE)
        self._encode_gathered()
        self._hold(self._encoder.flush())
        yield self._take()

    def _add(self, file: DataFile) -> Iterator[bytes]:
        if file.is_directory:
            self._begin(file, file.status, 0)
            self.files.append(PackedFile(file.name, file.status.st_mtime_ns, is_directory=True))
        elif (content := self._open_content(file)) is None:
            self.vanished.append(file.name)
        else:
            try:
                yield from self._pack(file, content)
            except OSError as error:
                raise refused(file.path, error) from error
            finally:
                content.close()
        if self._is_due:
            yield self._take()

    def _pack(self, file: DataFile, content: FileContent) -> Iterator[bytes]:
        done_before = self.done_bytes
        self.read_bytes += content.scanned_bytes
        if content.kind is not MemberKind.SKIPPED:
            self._begin(file, content.status, content.member_bytes)
            for piece in content.pieces():
                self._put(piece)
                self.done_bytes += len(piece)
                self.read_bytes += len(piece)
                if self._is_due:
                    yield self._take()
            self._put(_padding(content.member_bytes))
        self.done_bytes = done_before + content.status.st_size
        self.files.append(
            PackedFile(
                file.name, content.status.st_mtime_ns, content.kind, file_bytes=content.status.st_size,
                crc32c=content.crc32c, corrupt=content.corrupt,
            )
        )  # fmt: skip

    def _begin(self, file: DataFile, status: os.stat_result, size: int) -> None:
        self._put(
            member_header(
                file.name, size, stat.S_IMODE(status.st_mode), mtime=status.st_mtime_ns // 10**9,
                uid=status.st_uid, gid=status.st_gid, directory=file.is_directory,
            )
        )  # fmt: skip
        self.content_bytes += size
        self.catalog_bytes += status.st_size

    @property
    def _is_due(self) -> bool:
        return self._pending_bytes >= _CHUNK_BYTES or self._taken_bytes >= _STEP_BYTES

    def _put(self, piece: bytes) -> None:
        self._taken_bytes += len(piece)
        self._gathered.append(piece)
        self._gathered_bytes += len(piece)
        if self._gathered_bytes >= _GATHERED_BYTES:
            self._encode_gathered()

    def _encode_gathered(self) -> None:
        if len(self._gathered) > 1 and len(self._gathered[-1]) >= _GATHERED_BYTES:  # not copied to be joined
            large = self._gathered.pop()
            self._hold(self._encoder.encode(b"".join(self._gathered)))
            self._gathered = [large]
        self._hold(self._encoder.encode(b"".join(self._gathered)))
        self._gathered.clear()
        self._gathered_bytes = 0

    def _hold(self, packed: bytes) -> None:
        self._pending.append(packed)
        self._pending_bytes += len(packed)

    def _take(self) -> bytes:
        chunk = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = self._taken_bytes = 0
        return chunk


async def in_threads(
    chunks: Generator[bytes, None, None], executor: Executor | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield `chunks`, each made in a thread (of `executor`) when it is asked for.

    Asking is the back-pressure: nothing is read from the disk before the store has taken what was read last. To be
    closed (`contextlib.aclosing`), which closes `chunks` and the file it may have open.
    """
    try:
        while (chunk := await in_thread(next, chunks, None, executor=executor)) is not None:
            yield chunk
    finally:
        chunks.close()
