"""The JSON objects of a base backup as WAL-G writes them: sentinel, `metadata.json`, `files_metadata.json`.

Times are UTC with `Z` and microseconds; LSNs and the system identifier whole numbers. A file's time has nanoseconds:
WAL-G takes a delta on top of our backup only of files whose time is equal to the nanosecond.
"""

import json
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from tempfile import SpooledTemporaryFile
from typing import Any

from agent.domain.backup_file import MemberKind, PackedFile
from agent.domain.catalog import Backup
from agent.domain.restore_target import format_time
from agent.repository.backups import CONFIG_OUTSIDE, CORRUPT_PAGES, LIBC, DeltaOrigin

_DATE_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_LAST_SECOND = 253402300799  # of the year 9999, beyond which RFC 3339 has no words for a file's time
_SPOOL_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class BackupFacts:
    """What a base backup's documents say besides the files.

    catalog_bytes: sum of the sizes of everything walked, directories too. data_directory: as the server names it.
    tablespaces: OID of those outside it, to the directory. delta: what it builds on, None for a full one.
    libc, config_outside: of the server, see `ServerInfo`.
    """

    name: str
    start_lsn: int
    finish_lsn: int
    start_time: datetime
    finish_time: datetime
    pg_version: int
    system_identifier: int
    size_bytes: int
    stored_bytes: int
    catalog_bytes: int
    hostname: str
    data_directory: str
    tablespaces: Mapping[int, str]
    delta: DeltaOrigin | None = None
    permanent: bool = False
    corrupt_pages: int = 0
    libc: str | None = None
    config_outside: tuple[str, ...] = ()

    def backup(self) -> Backup:
        """Return the catalog's view of this backup."""
        return Backup(
            name=self.name,
            timeline=int(self.name[5:13], 16),
            start_lsn=self.start_lsn,
            finish_lsn=self.finish_lsn,
            start_time=self.start_time,
            finish_time=self.finish_time,
            modified_at=self.finish_time,
            pg_version=self.pg_version,
            system_identifier=self.system_identifier,
            size_bytes=self.size_bytes,
            stored_bytes=self.stored_bytes,
            permanent=self.permanent,
            parent=self.delta.parent if self.delta else None,
            full=self.delta.full if self.delta else None,
            delta_count=self.delta.count if self.delta else 0,
            catalog_bytes=self.catalog_bytes,
            corrupt_pages=self.corrupt_pages,
            counts_corrupt_pages=True,
            libc=self.libc,
            config_outside=self.config_outside,
        )


def sentinel_document(facts: BackupFacts) -> bytes:
    """Return the sentinel."""
    values: dict[str, Any] = {
        "LSN": facts.start_lsn,
        **_delta_values(facts.delta),
        "PgVersion": facts.pg_version,
        "FinishLSN": facts.finish_lsn,
        "SystemIdentifier": facts.system_identifier,
        "UncompressedSize": facts.size_bytes,
        "CompressedSize": facts.stored_bytes,
        "DataCatalogSize": facts.catalog_bytes,
    }
    if facts.tablespaces:
        values["Spec"] = _tablespace_spec(facts)
    values |= {
        "ChkpNum": None,
        "Version": 2,
        "StartTime": format_time(facts.start_time),
        "FinishTime": format_time(facts.finish_time),
        "DateFmt": _DATE_FORMAT,
        "Hostname": facts.hostname,
        "DataDir": facts.data_directory,
        "IsPermanent": facts.permanent,
        CORRUPT_PAGES: facts.corrupt_pages,
    }
    if facts.libc:
        values[LIBC] = facts.libc
    if facts.config_outside:
        values[CONFIG_OUTSIDE] = facts.config_outside
    return _compact(values)


def _delta_values(delta: DeltaOrigin | None) -> dict[str, Any]:
    if delta is None:
        return {}
    return {
        "DeltaLSN": delta.parent_lsn,
        "DeltaFrom": delta.parent,
        "DeltaFullName": delta.full,
        "DeltaCount": delta.count,
    }


def _tablespace_spec(facts: BackupFacts) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "base_prefix": facts.data_directory.rstrip("/"),
        "tablespaces": [str(oid) for oid in facts.tablespaces],
    }
    return spec | {
        str(oid): {"loc": location, "link": f"pg_tblspc/{oid}"} for oid, location in facts.tablespaces.items()
    }


def metadata_document(facts: BackupFacts) -> bytes:
    """Return `metadata.json`."""
    return _compact(
        {
            "start_time": format_time(facts.start_time),
            "finish_time": format_time(facts.finish_time),
            "date_fmt": _DATE_FORMAT,
            "hostname": facts.hostname,
            "data_dir": facts.data_directory,
            "pg_version": facts.pg_version,
            "start_lsn": facts.start_lsn,
            "finish_lsn": facts.finish_lsn,
            "is_permanent": facts.permanent,
            "system_identifier": facts.system_identifier,
            "uncompressed_size": facts.size_bytes,
            "compressed_size": facts.stored_bytes,
        }
    )


class FilesMetadataDocument:
    """`files_metadata.json` while it grows: every member that was written into a tar, skipped files, and nothing else.

    A member that is missing here is silently not restored by WAL-G. Beyond 16 MiB it grows in temporary files, so that
    memory does not depend on the number of files. The methods block for file I/O; `add_tar` may be called by several
    threads at once.
    """

    def __init__(self) -> None:
        self._files = SpooledTemporaryFile[bytes](_SPOOL_BYTES)
        self._sets = SpooledTemporaryFile[bytes](_SPOOL_BYTES)
        self._lock = threading.Lock()

    def add_tar(self, tar: str, files: Sequence[PackedFile]) -> None:
        """Add the tar object named `tar` (without a path) with what was read for it."""
        entries = b",".join(map(_entry, files))
        names = [file.name for file in files if file.kind is not MemberKind.SKIPPED]
        with self._lock:
            if entries:
                self._append(self._files, entries)
            self._append(self._sets, _named(tar, names))

    def add_label_tar(self, tar: str) -> None:
        """Add the tar object that holds the backup label; its members are listed in its set only."""
        self._append(self._sets, _named(tar, ["tablespace_map", "backup_label"]))

    @staticmethod
    def _append(file: "SpooledTemporaryFile[bytes]", entries: bytes) -> None:
        file.write(b"," + entries if file.tell() else entries)

    def chunks(self) -> Generator[bytes, None, None]:
        """Yield the document in pieces of about 1 MiB."""
        for opening, file in ((b'{"Files":{', self._files), (b'},"TarFileSets":{', self._sets)):
            yield opening
            file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        yield b"}}"

    def close(self) -> None:
        """Remove the temporary files."""
        for file in (self._files, self._sets):
            with suppress(OSError):  # of what was still to be written, for which there is no room
                file.close()


_KINDS = {
    kind: b':{"IsIncremented":%s,"IsSkipped":%s,"MTime":"' % tuple(
        b"true" if kind is each else b"false" for each in (MemberKind.INCREMENT, MemberKind.SKIPPED)
    )
    for kind in MemberKind
}  # fmt: skip


def _entry(file: PackedFile) -> bytes:
    """Return the file's entry, of which there may be millions."""
    seconds, nanoseconds = divmod(file.mtime_ns, 10**9)
    time = b'%s.%09dZ","UpdatesCount":0' % (_second(seconds), nanoseconds)
    corrupt = b""
    if file.corrupt.count:
        blocks = {"CorruptBlocksCount": file.corrupt.count, "SomeCorruptBlocks": file.corrupt.some}
        corrupt = b',"CorruptBlocks":' + _compact(blocks)
    return b"".join((_compact(file.name), _KINDS[file.kind], time, corrupt, b"}"))


@lru_cache(maxsize=4096)
def _second(seconds: int) -> bytes:
    moment = datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC)
    return moment.isoformat()[:19].encode()


def _named(name: str, value: Any) -> bytes:
    return b"%s:%s" % (_compact(name), _compact(value))


def _compact(value: Any) -> bytes:
    # Bytes of a file name that are no UTF-8 are lone surrogates here, for which JSON has only an escape.
    return _ENCODER.encode(value).encode(errors="backslashreplace")
