"""PostgreSQL's own backup manifest: size and CRC32C of every file, so that pg_verifybackup can prove a directory.

One file a line, as the server writes it. It describes the data directory as a restore makes it, also that of a delta.

Source: PostgreSQL docs, "Backup Manifest Format"; AddFileToBackupManifest() in src/backend/backup/backup_manifest.c.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from tempfile import SpooledTemporaryFile

import google_crc32c

from agent.domain.backup_file import PackedFile
from agent.domain.lsn import format_lsn
from agent.errors import RepositoryCorrupt

MANIFEST_FILE = "backup_manifest"
"""Its name in a data directory."""

_SPOOL_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_VERSION_WITH_IDENTIFIER = 170000
_LAST_SECOND = 253402300799
_FILE_LINES = (b'{ "Path"', b'{ "Encoded-Path"')
_CHECKSUM_LINE = b'"Manifest-Checksum": "'
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def file_line(path: str, size: int, mtime_ns: int, crc32c: int | None) -> bytes:
    """Return the line for the file `path`, below the data directory; without a checksum if that is not known."""
    try:
        name = f'"Path": {_ENCODER.encode(path)}'.encode()
    except UnicodeEncodeError:
        name = f'"Encoded-Path": "{os.fsencode(path).hex()}"'.encode()
    # The server writes the bytes of its integer, which is little-endian.
    checksum = (
        b"" if crc32c is None
        else b', "Checksum-Algorithm": "CRC32C", "Checksum": "%s"' % crc32c.to_bytes(4, "little").hex().encode()
    )  # fmt: skip
    return b'{ %s, "Size": %d, "Last-Modified": "%s"%s }' % (
        name, size, _second(mtime_ns // 10**9), checksum,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _second(seconds: int) -> bytes:
    moment = datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC)
    return f"{moment.isoformat(' ')[:19]} GMT".encode()


class ManifestDocument:
    """A backup manifest while it grows, in a temporary file beyond 8 MiB. Several threads may add to it at once."""

    def __init__(self) -> None:
        self._files = SpooledTemporaryFile[bytes](_SPOOL_BYTES)
        self._lock = threading.Lock()

    def add(self, files: Iterable[PackedFile]) -> None:
        """Add what was read; directories are not listed."""
        lines = [
            file_line(file.name.lstrip("/"), file.file_bytes, file.mtime_ns, file.crc32c)
            for file in files
            if not file.is_directory
        ]
        if lines:
            with self._lock:
                self._append(b",\n".join(lines))

    def add_content(self, path: str, content: bytes, mtime_ns: int = 0) -> None:
        """Add a small file."""
        with self._lock:
            self._append(file_line(path, len(content), mtime_ns, google_crc32c.value(content)))

    def _append(self, line: bytes) -> None:
        self._files.write((b",\n" if self._files.tell() else b"\n") + line)

    def chunks(
        self, *, pg_version: int, system_identifier: int, timeline: int, start_lsn: int, stop_lsn: int
    ) -> Generator[bytes, None, None]:
        """Yield the manifest in pieces of about 1 MiB. `pg_version` decides about its version."""
        wal = (
            f'{{ "Timeline": {timeline}, "Start-LSN": "{format_lsn(start_lsn)}", "End-LSN": "{format_lsn(stop_lsn)}" }}'
        )
        version = b'{ "PostgreSQL-Backup-Manifest-Version": 1,\n'
        if pg_version >= _VERSION_WITH_IDENTIFIER:
            version = (
                b'{ "PostgreSQL-Backup-Manifest-Version": 2,\n"System-Identifier": %d,\n' % system_identifier
            )  # fmt: skip
        digest = hashlib.sha256()
        for piece in self._pieces(version, f'\n],\n"WAL-Ranges": [\n{wal}\n],\n'.encode()):
            digest.update(piece)
            yield piece
        yield _last_line(digest.hexdigest())

    def _pieces(self, opening: bytes, closing: bytes) -> Iterator[bytes]:
        yield opening + b'"Files": ['
        self._files.seek(0)
        while piece := self._files.read(_CHUNK_BYTES):
            yield piece
        yield closing

    def close(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):  # of what was still to be written, for which there is no room
            self._files.close()


def _last_line(digest: str) -> bytes:
    return _CHECKSUM_LINE + digest.encode() + b'"}\n'


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """What a backup manifest says of the file `path`: its size, and its CRC32C, None if it does not tell one."""

    path: str
    size: int
    crc32c: int | None


def parse_file_line(line: bytes) -> ManifestEntry:
    """Read the line of a file in a backup manifest, PostgreSQL's or ours; raise `ValueError` if it is none."""
    try:
        values = json.loads(line.rstrip(b",\n"))
        encoded, size = values.get("Encoded-Path"), values["Size"]
        path = values["Path"] if encoded is None else os.fsdecode(bytes.fromhex(encoded))
        is_known = values.get("Checksum-Algorithm") == "CRC32C"
        (crc32c,) = struct.unpack("<I", bytes.fromhex(values["Checksum"])) if is_known else (None,)
    except (KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"no line of a file: {line[:80]!r}") from error
    if not (isinstance(path, str) and isinstance(size, int) and 0 <= size < 1 << 63):
        raise ValueError(f"no line of a file: {line[:80]!r}")
    return ManifestEntry(path, size, crc32c)


class ManifestReader:
    """Reads the files out of a backup manifest of ours that arrives in pieces. `key` is its name in messages.

    Its own checksum covers all of it: what was yielded is to be trusted when `finish` has returned.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._digest = hashlib.sha256()
        self._rest = b""
        self._ended = False

    def take(self, piece: bytes) -> Iterator[ManifestEntry]:
        """Yield the files whose lines are complete with the next bytes; raise `RepositoryCorrupt` as `finish`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_CHECKSUM_LINE):
                if line + b"\n" != _last_line(self._digest.hexdigest()):
                    raise self._corrupt("is not what its own checksum says")
                self._ended = True
            else:
                self._digest.update(line + b"\n")
                if line.startswith(_FILE_LINES):
                    yield self._entry(line)

    def finish(self) -> None:
        """Return if it was whole, else raise `RepositoryCorrupt`."""
        if not self._ended or self._rest:
            raise self._corrupt("is cut short")

    def _entry(self, line: bytes) -> ManifestEntry:
        try:
            return parse_file_line(line)
        except ValueError:
            raise self._corrupt(f"has a line that cannot be understood: {line[:80]!r}") from None

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the backup manifest {self._key} {problem}", hint="Bring back a copy of it, or take another base backup."
        )


def rewritten(lines: Iterable[bytes], contents: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield a manifest's `lines` with the entries of the files in `contents`, by path, made anew."""
    digest = hashlib.sha256()
    beginnings = {b'{ "Path": %s,' % json.dumps(path).encode(): path for path in contents}
    for line in lines:
        if line.startswith(_CHECKSUM_LINE):
            yield _last_line(digest.hexdigest())
            return
        path = next((path for beginning, path in beginnings.items() if line.startswith(beginning)), None)
        if path is not None:
            comma = b"," if line.rstrip(b"\n").endswith(b",") else b""
            line = file_line(path, len(contents[path]), 0, google_crc32c.value(contents[path])) + comma + b"\n"
        digest.update(line)
        yield line
