"""Puts base backups into a store as WAL-G lays them out, in all the ways it did over the years."""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import google_crc32c
from hypothesis.strategies import DataObject, booleans, integers, lists, sampled_from

from agent.domain.catalog import Backup
from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import RestoreTarget
from agent.domain.wal import segment_name
from agent.ports import ObjectStore
from agent.repository.keys import files_metadata_key, sentinel_key, tar_folder
from tests.support.object_formats import LZ4

SEGMENT_BYTES = 1 << 20
SYSTEM_IDENTIFIER = 7_300_000_000_000_000_001
Members = Mapping[str, bytes | None]
"""Names of tar members to their content, None for a directory."""


def control_file(
    *, system_identifier: int = SYSTEM_IDENTIFIER, segment_bytes: int = SEGMENT_BYTES, state: int = 6
) -> bytes:
    """Return a valid pg_control of PostgreSQL 15, by default in production."""
    content = bytearray(8192)
    struct.pack_into("<QIIi", content, 0, system_identifier, 1300, 202209061, state)
    struct.pack_into("<4I", content, 216, 8192, 131072, 8192, segment_bytes)
    struct.pack_into("<I", content, 288, google_crc32c.value(bytes(content[:288])))
    return bytes(content)


def label(start_lsn: int, timeline: int = 1) -> bytes:
    """Return a backup_label."""
    return (
        f"START WAL LOCATION: {format_lsn(start_lsn)} (file {segment_name(timeline, start_lsn, SEGMENT_BYTES)})\n"
        f"CHECKPOINT LOCATION: {format_lsn(start_lsn + 56)}\n"
        "BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-22 20:38:23 UTC\nLABEL: x\n"
        f"START TIMELINE: {timeline}\n"
    ).encode()


def tar_of(members: Members, *, links: Mapping[str, str] | None = None) -> bytes:
    """Return an archive of `members`, after symbolic `links`."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.mode = (tarfile.DIRTYPE, 0o700) if content is None else (tarfile.REGTYPE, 0o600)
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return body.getvalue()


@dataclass
class BackupContent:
    """What a base backup consists of. The defaults make a small, sound, full one, as WAL-G 3.0.9 writes it.

    parts: the members of each part. last: those of the tars after them, by the tar's name without extension.
    files: `Files` of files_metadata.json; None: every member of the parts, complete. sets: its `TarFileSets`.
    tablespaces: OID to directory. sentinel: more fields of the sentinel.
    """

    start_lsn: int = 0x900028
    parts: Sequence[Members] = field(default_factory=lambda: [SMALL])
    last: Mapping[str, Members] | None = None
    files: Mapping[str, Mapping[str, bool]] | None = None
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tablespaces: Mapping[int, str] = field(default_factory=dict)
    parent: Backup | None = None
    sentinel: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backup(self) -> Backup:
        """Its entry in the catalog."""
        moment = datetime(2026, 11, 22, 20, tzinfo=UTC)
        segment = segment_name(1, self.start_lsn, SEGMENT_BYTES)
        parent = self.parent
        return Backup(
            name=f"base_{segment}" + (f"_D_{parent.start_segment}" if parent else ""),
            timeline=1,
            start_lsn=self.start_lsn,
            finish_lsn=self.start_lsn + 216,
            start_time=moment,
            finish_time=moment,
            modified_at=moment,
            pg_version=150020,
            system_identifier=SYSTEM_IDENTIFIER,
            size_bytes=1,
            stored_bytes=1,
            permanent=False,
            parent=parent.name if parent else None,
            full=(parent.full or parent.name) if parent else None,
            delta_count=parent.delta_count + 1 if parent else 0,
        )

    def last_tars(self) -> Mapping[str, Members]:
        """Return the tars after the parts."""
        if self.last is not None:
            return self.last
        lines = "".join(f"{oid} {directory}\n" for oid, directory in self.tablespaces.items())
        return {
            "pg_control": {"/global/pg_control": control_file()},
            "backup_label": {"backup_label": label(self.start_lsn), "tablespace_map": lines.encode()},
        }

    async def put(self, store: ObjectStore) -> None:
        """Store all of its objects, the sentinel last."""
        folder = tar_folder(self.backup.name)
        for number, members in enumerate(self.parts, start=1):
            await store.put(f"{folder}part_{number:03d}.tar{LZ4.extension}", LZ4.encode(tar_of(members)))
        for name, members in self.last_tars().items():
            await store.put(f"{folder}{name}.tar{LZ4.extension}", LZ4.encode(tar_of(members)))
        files = self.files
        if files is None:
            files = {name: {} for members in self.parts for name in members}
        metadata = {
            "Files": {name: {"MTime": "2026-11-22T20:00:00.5Z", **flags} for name, flags in files.items()},
            "TarFileSets": self.sets,
        }
        await store.put(files_metadata_key(self.backup.name), json.dumps(metadata).encode())
        await store.put(sentinel_key(self.backup.name), json.dumps(self._sentinel()).encode())

    def _sentinel(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "LSN": self.start_lsn,
            "FinishLSN": self.backup.finish_lsn,
            "PgVersion": 150020,
            "SystemIdentifier": SYSTEM_IDENTIFIER,
            "Version": 2,
        }
        if self.tablespaces:
            entries = {str(oid): {"loc": loc, "link": f"pg_tblspc/{oid}"} for oid, loc in self.tablespaces.items()}
            names = [str(oid) for oid in self.tablespaces]
            values["Spec"] = {"base_prefix": "/srv/data", "tablespaces": names, **entries}
        if self.parent is not None:
            values |= {
                "DeltaLSN": self.parent.start_lsn,
                "DeltaFrom": self.parent.name,
                "DeltaFullName": self.backup.full,
                "DeltaCount": self.backup.delta_count,
            }
        return values | dict(self.sentinel)


SMALL: Members = {
    "/": None,
    "/PG_VERSION": b"15\n",
    "/base": None,
    "/base/1": None,
    "/base/1/1259": bytes(range(256)) * 64,
    "/global": None,
    "/global/pg_filenode.map": b"map",
    "/pg_wal": None,
    "/postgresql.auto.conf": b"# nothing\n",
}


def plan_of(*chain: BackupContent) -> RestorePlan:
    """Return a plan that hydrates `chain`, the full one first."""
    target = RestoreTarget(timeline="1")
    backups = tuple(content.backup for content in chain)
    return RestorePlan(backups[-1], backups, target, target, 1, SEGMENT_BYTES, (backups[-1].start_segment,))


PAGE = 8192


def page(seed: int) -> bytes:
    """Return a page that no other seed has."""
    return struct.pack("<I", seed) * (PAGE // 4)


def increment_of(content: bytes, blocks: Sequence[int]) -> bytes:
    """Return the increment of a file with this content that holds these blocks of it."""
    pages = b"".join(content[block * PAGE : (block + 1) * PAGE] for block in blocks)
    return (
        struct.pack("<4sQI", b"wi1\x55", len(content), len(blocks)) + struct.pack(f"<{len(blocks)}I", *blocks) + pages
    )


def _changed(draw: Callable[..., Any], seed: int, content: bytes) -> tuple[bytes, list[int]]:
    """Return a later state of a relation file and the blocks that an increment must hold."""
    pages = [content[i : i + PAGE] for i in range(0, len(content), PAGE)][: draw(integers(0, 6))]
    blocks = draw(lists(integers(0, max(0, len(pages) - 1)), unique=True, max_size=len(pages))) if pages else []
    for block in blocks:
        pages[block] = page(seed + block)
    grown = draw(integers(0, 2))
    blocks = sorted({*blocks, *range(len(pages), len(pages) + grown)})
    return b"".join([*pages, *(page(seed + 50 + i) for i in range(grown))]), blocks


def state_after(drawn: DataObject, backups: int) -> tuple[list[BackupContent], dict[str, bytes]]:
    """Return a chain of so many base backups, and the files that the last one saw."""
    state = {f"/base/1/{number}": page(number) * drawn.draw(integers(0, 4)) for number in range(6)}
    parts: list[Members] = [SMALL, dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    chain = [BackupContent(parts=parts, sets=_sets(parts) if drawn.draw(booleans()) else {})]
    for step in range(1, backups):
        state, members, files = _next_state(drawn, step, state)
        halves = [dict(list(members.items())[::2]), dict(list(members.items())[1::2])]
        delta = BackupContent(0x900028 + step * 0x100000, parts=halves, files=files, parent=chain[-1].backup)
        delta.sets = _sets(halves) if drawn.draw(booleans()) else {}
        chain.append(delta)
    small = {name.lstrip("/"): body for name, body in SMALL.items() if body is not None}
    return chain, small | {name.lstrip("/"): body for name, body in state.items()}


def _sets(parts: Sequence[Members]) -> dict[str, list[str]]:
    return {f"part_{number:03d}.tar.lz4": list(members) for number, members in enumerate(parts, start=1)}


def _next_state(
    drawn: DataObject, step: int, state: Mapping[str, bytes]
) -> tuple[dict[str, bytes], dict[str, bytes | None], dict[str, dict[str, bool]]]:
    """Return the next state, and the members and the file list of a delta that leads there."""
    after: dict[str, bytes] = {}
    members: dict[str, bytes | None] = {name: body for name, body in SMALL.items() if name != "/base/1/1259"}
    files: dict[str, dict[str, bool]] = {name: {} for name in members}
    files["/base/1/1259"] = {"IsSkipped": True}
    for name, content in state.items():
        fate = drawn.draw(sampled_from(["unchanged", "increment", "replaced", "dropped"]))
        if fate == "unchanged":
            after[name], files[name] = content, {"IsSkipped": True}
        elif fate == "increment":
            after[name], blocks = _changed(drawn.draw, 1000 * step, content)
            members[name], files[name] = increment_of(after[name], blocks), {"IsIncremented": True}
        elif fate == "replaced":
            after[name] = members[name] = page(2000 * step)
            files[name] = {}
    if drawn.draw(booleans()):
        name = f"/base/1/{100 + step}"
        after[name] = members[name] = page(step)
        files[name] = {}
    return after, members, files
