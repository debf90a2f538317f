"""What a delta stores of a directory, applied to what the parent stored, gives the directory again."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import DataObject, booleans, data, integers, sampled_from, sets

from agent.backup.delta_files import DeltaCounts, DeltaFiles, FindChanges, Increment, by_page_lsn, by_wal_summaries
from agent.domain.backup_file import MemberKind
from agent.domain.delta_file import RelationSegment, relation_segment
from agent.domain.page import PAGE_BYTES
from agent.domain.wal_summaries import ChangedBlocks
from agent.postgres.data_files import DataFile
from agent.postgres.file_content import READ_BYTES, WholeFiles
from agent.repository.increments import IncrementApplier
from agent.repository.parent_files import ParentFiles
from agent.repository.tar_parts import TarPart
from tests.support.base_backup import read_members
from tests.support.object_formats import PLAIN
from tests.support.pages import unchecked_page

SECOND = 10**9
WHOLE, INCREMENT, SKIPPED = MemberKind.WHOLE, MemberKind.INCREMENT, MemberKind.SKIPPED
NAMES = ["/base/5/16384", "/base/5/16384.1", "/base/5/16385", "/base/5/16385_fsm", "/base/6/16384", "/pg_xact/0000"]
SEGMENT_BLOCKS = 64


class World:
    """A data directory whose files change; `now` is its clock in seconds and, as `lsn`, its WAL position."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1_700_000_000
        self.changed = ChangedBlocks()
        for database in (5, 6):
            self.write(f"/base/{database}/PG_VERSION", b"18\n")
        self.write("/PG_VERSION", b"18\n")
        self.now += 100

    @property
    def lsn(self) -> int:
        return self.now << 12

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(self.now * SECOND, self.now * SECOND))

    def note(self, name: str, blocks: list[int], limit: int | None = None) -> None:
        """Tell the WAL summary what became of a file."""
        segment = relation_segment(name)
        if segment is None:
            return
        first, key = segment.segment * SEGMENT_BLOCKS, (segment.tablespace, segment.database, segment.relation)
        self.changed.add(*key, b"".join((first + block).to_bytes(8, "big") for block in blocks))
        if limit is not None:
            self.changed.add_limit(*key, first + limit)

    def content(self) -> dict[str, bytes]:
        return {f"/{path.relative_to(self.root)}": path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def files(self) -> Iterator[DataFile]:
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                yield DataFile(f"/{path.relative_to(self.root)}", str(path), path.stat())

    def change(self, drawn: DataObject) -> None:
        """Write, cut, extend, drop or make one file, as PostgreSQL does: with LSNs of now."""
        self.now += drawn.draw(sampled_from([0, 10]))  # 0: within the tick of the one before, or of the parent's start
        name = drawn.draw(sampled_from(NAMES))
        path = self.root / name[1:]
        pages = _pages(path.read_bytes()) if path.exists() else []
        fate = drawn.draw(sampled_from(["pages", "pages", "cut", "extend", "extend with nothing", "drop", "odd"]))
        fill, limit, blocks = drawn.draw(integers(0, 255)), None, list[int]()
        if fate == "drop" or (fate == "odd" and not pages):
            path.unlink(missing_ok=True)
            self.note(name, [], 0)
            return
        if fate == "cut":
            pages = pages[: drawn.draw(integers(0, len(pages)))]
            limit = len(pages)
        elif fate.startswith("extend"):
            blocks = list(range(len(pages), len(pages) + drawn.draw(integers(1, 20))))
            is_empty = fate != "extend"
            pages += [bytes(PAGE_BYTES) if is_empty else unchecked_page(self.lsn, fill) for _ in blocks]
            blocks = [] if is_empty else blocks  # extended without WAL
        else:
            for block in drawn.draw(sets(integers(0, len(pages) - 1), max_size=4)) if pages else ():
                pages[block] = unchecked_page(self.lsn, fill)
                blocks.append(block)
        if not path.exists():
            limit = 0
        self.note(name, blocks, limit)
        self.write(name, b"".join(pages) + (b"odd" if fate == "odd" and name.endswith("_fsm") else b""))


def _pages(content: bytes) -> list[bytes]:
    return [content[start : start + PAGE_BYTES] for start in range(0, len(content) - PAGE_BYTES + 1, PAGE_BYTES)]


def applied(parent: bytes, increment: bytes) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(parent)
        file.flush()
        applier = IncrementApplier(file.fileno(), len(increment), "of a file")
        applier.write(memoryview(increment))
        applier.finish()
        file.seek(0)
        return file.read()


class Backups:
    """The base backups of a `World`: each a delta on the one before, and what restoring the newest gives."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restored: dict[str, bytes] = {}
        self.kinds: dict[str, MemberKind] = {}
        self.delta: DeltaFiles | None = None
        self._files: ParentFiles | None = None
        self._started, self._lsn = 0, 0

    def take(self, *, by_summaries: bool = False) -> None:
        started, lsn = self.world.now, self.world.lsn
        whole = WholeFiles(None).open
        self.delta = None
        if self._files is not None:
            self.delta = DeltaFiles(
                self._files, self._started * SECOND, self._find(by_summaries), whole, None, self.world.root
            )
        part = TarPart("part_001.tar", PLAIN, whole if self.delta is None else self.delta.open)
        members = read_members(part.name, b"".join(part.pack(self.world.files(), 1 << 60)), PLAIN)
        stored = {member.name: member.content for member in members}
        self.kinds = {file.name: file.kind for file in part.files}
        self.restored = {name: self._content(name, kind, stored) for name, kind in self.kinds.items()}
        self._files, self._started, self._lsn = ParentFiles(), started, lsn
        for file in part.files:
            self._files.add(file.name, file.mtime_ns)
        self._files.seal()
        self.world.changed = ChangedBlocks()

    def _find(self, by_summaries: bool) -> FindChanges:
        if not by_summaries:
            return by_page_lsn(self._lsn, SEGMENT_BLOCKS, hints_are_logged=True)
        self.world.changed.seal()
        return by_wal_summaries(self.world.changed, SEGMENT_BLOCKS)

    def _content(self, name: str, kind: MemberKind, stored: Mapping[str, bytes]) -> bytes:
        if kind is SKIPPED:
            assert name not in stored
            return self.restored[name]
        return applied(self.restored[name], stored[name]) if kind is INCREMENT else stored[name]


@contextmanager
def made_world() -> Iterator[World]:
    root = Path(tempfile.mkdtemp())
    try:
        yield World(root)
    finally:
        shutil.rmtree(root)


@pytest.fixture
def world() -> Iterator[World]:
    with made_world() as made:
        yield made


@settings(max_examples=60)
@given(data())
def test_a_chain_of_deltas_gives_the_directory_whatever_happened_between_them(drawn: DataObject) -> None:
    by_summaries = drawn.draw(booleans())
    with made_world() as world:
        backups = Backups(world)
        for _ in range(4):
            for _ in range(drawn.draw(integers(0, 6))):
                world.change(drawn)
            backups.take(by_summaries=by_summaries)
            assert backups.restored == world.content()


def relation(pages: int, lsn: int) -> bytes:
    return b"".join(unchecked_page(lsn, number) for number in range(pages))


def taken_twice(world: World, change: Callable[[Path], None], *, by_summaries: bool = False) -> Backups:
    """Take a backup of one relation of 200 pages, change it, take another."""
    world.write("/base/5/16384", relation(200, world.lsn))
    world.now += 10
    backups = Backups(world)
    backups.take()
    world.now += 10
    change(world.root / "base/5/16384")
    backups.take(by_summaries=by_summaries)
    assert backups.restored == world.content()
    return backups


def test_a_file_that_nobody_touched_is_left_out(world: World) -> None:
    backups = taken_twice(world, lambda _: None)
    assert backups.kinds["/base/5/16384"] is SKIPPED
    assert backups.delta is not None
    assert backups.delta.counts == DeltaCounts(left_out=4)


def test_only_changed_pages_of_a_file_are_stored(world: World) -> None:
    def change(path: Path) -> None:
        pages = relation(200, world.lsn - 20 * 4096)
        world.write("/base/5/16384", pages[: 7 * PAGE_BYTES] + relation(3, world.lsn) + pages[10 * PAGE_BYTES :])

    backups = taken_twice(world, change)
    assert backups.kinds["/base/5/16384"] is INCREMENT
    assert backups.delta is not None
    assert backups.delta.counts == DeltaCounts(left_out=3, increments=1, pages=3)


def test_a_file_of_which_nearly_all_changed_is_stored_whole(world: World) -> None:
    backups = taken_twice(world, lambda _: world.write("/base/5/16384", relation(200, world.lsn)))
    assert backups.kinds["/base/5/16384"] is WHOLE


def test_a_relation_of_other_pages_than_postgresqls_is_stored_whole(world: World) -> None:
    odd = b"\xff" * PAGE_BYTES
    backups = taken_twice(world, lambda _: world.write("/base/5/16384", relation(100, 1 << 20) + odd))
    assert backups.kinds["/base/5/16384"] is WHOLE


def test_a_database_made_since_is_stored_whole_although_its_pages_are_old(world: World) -> None:
    def copy(_: Path) -> None:
        """CREATE DATABASE with the OID of one that was dropped, copying an older one's files."""
        world.write("/base/5/PG_VERSION", b"18\n")
        world.write("/base/5/16384", relation(150, 1 << 20))

    assert taken_twice(world, copy).kinds["/base/5/16384"] is WHOLE


def test_a_file_cut_after_it_was_opened_is_padded_and_its_increment_stays_whole(world: World) -> None:
    world.write("/base/5/16384", relation(200, world.lsn))
    world.now += 10
    backups = Backups(world)
    backups.take()
    world.now += 10
    world.write("/base/5/16384", relation(150, 1 << 20) + relation(50, world.lsn))
    path = world.root / "base/5/16384"
    descriptor = os.open(path, os.O_RDONLY)
    find = by_page_lsn(world.lsn, SEGMENT_BLOCKS, hints_are_logged=True)
    blocks, _ = find(descriptor, str(path), RelationSegment(1663, 5, 16384, 0), 200 * PAGE_BYTES)
    assert blocks is not None
    increment = Increment(descriptor, path.stat(), blocks, None)
    os.truncate(path, 160 * PAGE_BYTES)
    stored = b"".join(increment.pieces())
    increment.close()
    assert len(stored) == increment.member_bytes
    result = applied(backups.restored["/base/5/16384"], stored)
    assert result[150 * PAGE_BYTES : 160 * PAGE_BYTES] == path.read_bytes()[150 * PAGE_BYTES :]
    assert result[160 * PAGE_BYTES :] == bytes(40 * PAGE_BYTES)


def test_pieces_stay_small_however_much_changed(world: World) -> None:
    world.write("/base/5/16384", relation(1000, world.lsn))
    path = world.root / "base/5/16384"
    blocks = [*range(5), *range(300, 600), *range(601, 990, 2)]
    increment = Increment(os.open(path, os.O_RDONLY), path.stat(), blocks, None)
    pieces = list(increment.pieces())
    increment.close()
    assert max(map(len, pieces)) <= READ_BYTES
    assert (
        applied(b"", b"".join(pieces))[300 * PAGE_BYTES : 600 * PAGE_BYTES]
        == path.read_bytes()[300 * PAGE_BYTES : 600 * PAGE_BYTES]
    )
