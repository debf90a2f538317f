"""What an interrupted hydration has completed: a file for each tar, in a folder of the directory that is filled.

A tar is done when all that was written from it is durable; then its record is written, durably. So a restore that is
killed goes on with the tars that have none. The records are believed only for the very same work: the same base
backups, objects and tablespaces; for other work everything begins anew.

A record: the BLAKE3 of what follows, one line of JSON, then the digests of the names that arrived (64 bits each, of
this machine's byte order), then the block numbers of each increment (32 bits each). One that is damaged is none: its
tar is downloaded again.
"""

import json
import shutil
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from agent.postgres.durable import fsync_directory, replace_durably

FOLDER = "pitr.hydration"
_WORK = "work.json"
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Increment:
    """An increment that was applied: the file, its size then, the blocks that the increment holds."""

    name: str
    file_bytes: int
    blocks: "array[int]"


@dataclass(slots=True)
class PartRecord:
    """What came out of a tar. arrived: digests of the names of its files and directories that were wanted."""

    arrived: "array[int]" = field(default_factory=lambda: array("Q"))
    increments: list[Increment] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return it as it is stored."""
        increments = [[each.name, each.file_bytes, len(each.blocks)] for each in self.increments]
        head = json.dumps({"arrived": len(self.arrived), "increments": increments}).encode()
        content = b"".join([head, b"\n", self.arrived.tobytes(), *(each.blocks.tobytes() for each in self.increments)])
        return blake3(content).digest() + content

    @classmethod
    def from_bytes(cls, stored: bytes) -> "PartRecord | None":
        """Read what `to_bytes` wrote; None if it is not that."""
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if blake3(content).digest() != digest:
            return None
        line, _, rest = content.partition(b"\n")
        head, result = json.loads(line), cls()

        def take(values: "array[int]", count: int) -> "array[int]":
            nonlocal rest
            size = count * values.itemsize
            values.frombytes(rest[:size])
            rest = rest[size:]
            return values

        take(result.arrived, head["arrived"])
        for name, file_bytes, blocks in head["increments"]:
            result.increments.append(Increment(name, file_bytes, take(array("I"), blocks)))
        return result


class PartsDone:
    """The records in the directory `data_directory`. The methods block for file I/O and raise `OSError`."""

    def __init__(self, data_directory: Path) -> None:
        self.folder = data_directory / FOLDER

    def is_about(self, work: Mapping[str, object]) -> bool:
        """Tell whether the records, if there are any, are about this work."""
        try:
            return bool(json.loads((self.folder / _WORK).read_bytes()) == work)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False

    def begin(self, work: Mapping[str, object]) -> None:
        """Forget all records; those to come are about `work` (JSON)."""
        self.forget()
        self.folder.mkdir(mode=0o700)
        replace_durably(self.folder / _WORK, json.dumps(work).encode())
        fsync_directory(self.folder.parent)

    def read(self, key: str) -> PartRecord | None:
        """Return the record of the tar stored as `key`, None if it is not known to be done."""
        try:
            return PartRecord.from_bytes(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def write(self, key: str, record: PartRecord) -> None:
        """Record that the tar stored as `key` is done: all that it gave is durable."""
        replace_durably(self._path(key), record.to_bytes())

    def forget(self) -> None:
        """Remove all records: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / key.replace("/", "_")
