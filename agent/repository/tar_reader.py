"""Reads the tars of a base backup as they arrive: an object's pieces are unpacked and handed on, never held whole.

What is not exactly one whole archive is `RepositoryCorrupt` and names the object: a stream that is cut short, a codec
that has not seen its end, a missing end of archive, anything but zeros after it.
"""

import re
import tarfile
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.object_format import ObjectFormat
from agent.tasks import in_thread

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED_BYTES = 1 << 20  # of a PAX header or a long name
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_USTAR_MAGIC = b"ustar\0"
_PAX_SIZE = re.compile(r"[0-9]{1,18}")


class MemberKind(Enum):
    """What a member of an archive is."""

    FILE = "file"
    DIRECTORY = "directory"
    OTHER = "other"  # links, devices


@dataclass(frozen=True, slots=True)
class Member:
    """A member's header. `name` is as stored, bytes that are no UTF-8 as surrogates; `mode` are permission bits."""

    name: str
    kind: MemberKind
    mode: int
    size: int


def path_below(name: str, source: str) -> str:
    """Turn the name of a tar member into a path below the data directory, empty for that itself.

    Local backups of WAL-G begin names with a slash, those taken through the replication protocol with nothing or `./`.

    Raises:
        RepositoryCorrupt: It leads elsewhere.
    """
    if "/." not in name and "//" not in name and name[:1] != "." and "\0" not in name:
        return name.strip("/")  # as nearly all: nothing to look for
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise RepositoryCorrupt(
            f"{source} holds a file with the name {name[:200]!r}",
            hint="No base backup holds such a name: the object was made to write elsewhere. Find out who stored it.",
        )
    return "/".join(parts)


_PLAIN_KINDS = {tarfile.REGTYPE: MemberKind.FILE, tarfile.DIRTYPE: MemberKind.DIRECTORY}


def plain_member(block: bytes) -> Member | None:
    """Return what a header says that is plain USTAR, of a file or directory with a short name; None of any other.

    The same as `TarInfo.frombuf` would say, in a fifth of the time: a cluster has many small files.
    """
    kind = _PLAIN_KINDS.get(block[156:157])
    mode, size, checksum = block[100:107], block[124:135], block[148:154]
    if kind is None or block[257:263] != _USTAR_MAGIC or block[345] or (mode + size + checksum).strip(b"01234567"):
        return None
    if block[107] or block[135] or block[154] or int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if kind is MemberKind.DIRECTORY:
        return Member(name.rstrip("/"), kind, int(mode, 8) & 0o7777, 0) if not int(size, 8) else None
    return Member(name, kind, int(mode, 8) & 0o7777, int(size, 8))


class MemberSink(Protocol):
    """Takes an archive's members one after the other; called in a thread."""

    def begin(self, member: Member) -> None:
        """A member begins."""

    def write(self, data: memoryview) -> None:
        """The next bytes of its content; not to be kept after the call."""

    def end(self) -> None:
        """The member is complete."""


async def read_tar(
    store: ObjectStore,
    key: str,
    objects: ObjectFormat,
    sink: MemberSink,
    on_read: Callable[[int], None],
    *,
    executor: Executor | None = None,
) -> None:
    """Read the tar stored as `key` into `sink`; `on_read` is told the stored bytes of each piece.

    Memory: a piece of 1 MiB, what it decodes to in pieces of 1 MiB, and the codec's own.

    Raises:
        WrongKey: It is not encrypted as the settings say.
        RepositoryCorrupt: It is absent, or not one whole archive.
        RepositoryError: It could not be read.
    """
    parser = TarParser(key, sink)
    decoder = objects.decoder(key, parser.take)

    def finish() -> None:
        decoder.finish()
        parser.finish()

    async with store.open(key) as pieces:
        if pieces is None:
            raise RepositoryCorrupt(f"object {key} is missing", hint="Bring back a copy of it, or use another backup.")
        async for piece in pieces:
            await in_thread(decoder.take, piece, executor=executor)
            on_read(len(piece))
    await in_thread(finish, executor=executor)


class TarParser:
    """Takes the bytes of the archive called `source`, in pieces of any size, and tells `sink` the members in them.

    Understands USTAR, PAX and GNU headers. `take` and `finish` raise `RepositoryCorrupt`.
    """

    def __init__(self, source: str, sink: MemberSink) -> None:
        self._source = source
        self._sink = sink
        self._block = bytearray()  # of a header that has not arrived whole
        self._content_left = 0
        self._padding_left = 0
        self._extended: bytearray | None = None
        self._extended_type = b""
        self._overrides: dict[str, str] = {}
        self._ended = False

    def take(self, data: bytes) -> None:
        """Take the next bytes."""
        view, position = memoryview(data), 0
        while position < len(view):
            if self._content_left:
                count = min(self._content_left, len(view) - position)
                self._content(view[position : position + count])
            elif self._padding_left:
                count = min(self._padding_left, len(view) - position)
                self._padding_left -= count
            elif self._ended:
                self._require_zeros(view[position:])
                return
            else:
                count = min(_BLOCK - len(self._block), len(view) - position)
                self._block += view[position : position + count]
                if len(self._block) == _BLOCK:
                    block, self._block = bytes(self._block), bytearray()
                    self._header(block)
            position += count

    def finish(self) -> None:
        """Return if what was taken is a whole archive."""
        if not self._ended:
            raise self._corrupt("is cut short: it has no end of archive")

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the archive in {self._source} {problem}",
            hint="The object was damaged or cut short after it was stored; bring back a copy, or use another backup.",
        )

    def _content(self, data: memoryview) -> None:
        if self._extended is not None:
            self._extended += data
        else:
            self._sink.write(data)
        self._content_left -= len(data)
        if not self._content_left:
            self._end_content()

    def _end_content(self) -> None:
        if self._extended is None:
            self._sink.end()
            return
        content, self._extended = bytes(self._extended), None
        if self._extended_type == tarfile.GNUTYPE_LONGNAME:
            self._overrides["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif self._extended_type in _PAX:
            self._overrides.update(self._pax_records(content))

    def _header(self, block: bytes) -> None:
        if block.count(0) == len(block):
            self._ended = True
            return
        member = plain_member(block) if not self._overrides else None
        if member is not None:
            self._begin(member)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._corrupt(f"is damaged: {error}") from error
        if info.type in _EXTENDED:
            self._begin_extended(info)
            return
        size = int(self._overrides.get("size", info.size))
        is_file = info.type in _REGULAR
        if size < 0 or (size and not is_file):
            raise self._corrupt(f"is damaged: its member {info.name[:200]!r} has {size} bytes")
        kind = MemberKind.FILE if is_file else MemberKind.DIRECTORY if info.isdir() else MemberKind.OTHER
        name = self._overrides.get("path", info.name)
        self._overrides = {}
        self._begin(Member(name, kind, info.mode & 0o7777, size))

    def _begin(self, member: Member) -> None:
        self._content_left, self._padding_left = member.size, -member.size % _BLOCK
        self._sink.begin(member)
        if not member.size:
            self._sink.end()

    def _begin_extended(self, info: tarfile.TarInfo) -> None:
        if not 0 <= info.size <= _MAX_EXTENDED_BYTES:
            raise self._corrupt(f"is damaged: a header of {info.size} bytes")
        self._extended, self._extended_type = bytearray(), info.type
        self._content_left, self._padding_left = info.size, -info.size % _BLOCK
        if not info.size:
            self._extended = None

    def _pax_records(self, content: bytes) -> dict[str, str]:
        """Read the records `LENGTH KEYWORD=VALUE\\n` of a PAX header that matter here."""
        records: dict[str, str] = {}
        while content:
            digits, space, _ = content.partition(b" ")
            length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
            record, content = content[len(digits) + 1 : length], content[length:]
            keyword, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self._corrupt("is damaged: a PAX header cannot be read")
            records[keyword.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        if not _PAX_SIZE.fullmatch(records.get("size", "0")) or any(name.startswith("GNU.sparse") for name in records):
            raise self._corrupt("has a PAX header that is not understood")
        return {name: records[name] for name in ("path", "size") if name in records}

    def _require_zeros(self, rest: memoryview) -> None:
        if bytes(rest).count(0) != len(rest):
            raise self._corrupt("goes on after its end")
