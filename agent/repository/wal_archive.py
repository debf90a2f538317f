"""The WAL part of a repository: WAL files out and in, never replaced, never handed on unchecked.

Invariants:
    A WAL file's name is stored once: what is there under any extension is compared, not overwritten.
    `fetch` returns bytes whose packing, digest, size and header were checked, or None if a listing proved absence.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import zip_longest
from tempfile import TemporaryFile

from agent.domain.timeline import Ancestor, parse_history
from agent.domain.wal import SegmentHeader, WalFileKind, parse_segment_header, wal_file_kind
from agent.domain.wal_check import CheckedSegment
from agent.domain.wal_times import SegmentTimes, segment_times_of
from agent.errors import ConfigError, RepositoryCorrupt, RepositoryUnavailable, WalConflict
from agent.ports import ObjectInfo, ObjectStore, OpenObject
from agent.repository.keys import WAL_FOLDER, wal_key
from agent.repository.listed_names import ListedNames
from agent.repository.object_format import EXTENSIONS, ObjectFormat
from agent.repository.read_twice import read_twice
from agent.repository.wal_content import WalContent
from agent.repository.wal_metadata import DIGEST, SYSTEM_IDENTIFIER, read_content_bytes, read_times
from agent.repository.wal_packing import Description, Packed, WalPacker
from agent.tasks import in_thread, task_group

_LISTINGS_AT_ONCE = 8


def gone(name: str) -> RepositoryUnavailable:
    """Return the error that says that the segment `name`, which was listed, is not there any more."""
    return RepositoryUnavailable(
        f'WAL segment "{name}" was removed from the repository while it was looked at',
        hint="Ask again; if an expiry is running, let it end first.",
    )


@dataclass(frozen=True, slots=True)
class WalObject:
    """A stored WAL file: its PostgreSQL name, what it is, the object's key and its size as stored."""

    name: str
    kind: WalFileKind
    key: str
    size: int

    @property
    def extension(self) -> str:
        """What the key has after the name: that of the codec."""
        return self.key.removeprefix(WAL_FOLDER + self.name)


@dataclass(frozen=True, slots=True)
class Stored:
    """Outcome of storing a WAL file: bytes stored now, or 0 with `already` if the same content was there."""

    stored_bytes: int
    already: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """What an object holds: the digest (hex) of the plain content, and the database cluster, if that is known."""

    info: ObjectInfo
    digest: str
    owner: str | None


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A WAL file that was read and checked: its size, and what walking its records found, if nothing else proved it."""

    size: int
    records: CheckedSegment | None


def parse_wal_object(info: ObjectInfo) -> WalObject | None:
    """Tell which WAL file an object below `wal_005/` holds, or None if it is none (metadata, deltas, foreign)."""
    base = info.key.removeprefix(WAL_FOLDER)
    for extension in EXTENSIONS:
        name = base.removesuffix(extension) if extension else base.rstrip(".")
        if (extension == "" or name != base) and (kind := wal_file_kind(name)) is not None:
            return WalObject(name, kind, info.key, info.size)
    return None


def _gone(name: str) -> RepositoryUnavailable:
    return RepositoryUnavailable(
        f'WAL file "{name}" was in the repository a moment ago, and is not now',
        hint="Something removes objects from the repository: find out what, and stop it.",
    )


class OpenWal:
    """A stored WAL file, to be read once. Its content has been checked when it was read to its end, and not before."""

    def __init__(self, name: str, opened: OpenObject, objects: ObjectFormat, system_identifier: int | None) -> None:
        digest = opened.info.metadata.get(DIGEST)
        self._opened = opened
        self.content = WalContent(name, opened.info.key, objects, digest=digest, system_identifier=system_identifier)

    async def read(self, write: Callable[[bytes], object], *, executor: Executor | None = None) -> WalContent:
        """Hand the plain bytes to `write`, which is called in threads (of `executor`); return what was read.

        Raises:
            RepositoryCorrupt: It is damaged, or is not the file (of the database cluster) that was asked for.
            RepositoryError: It could not be read.
        """
        async for stored in self._opened:
            await in_thread(_for_each, self.content.unpack(stored), write, executor=executor)
        await in_thread(_for_each, self.content.rest(), write, executor=executor)
        return self.content

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the plain bytes in pieces of 1 MiB at most. Raises as `read`."""
        async for stored in self._opened:
            plain = self.content.unpack(stored)
            while (piece := await in_thread(next, plain, None)) is not None:
                yield piece
        plain = self.content.rest()
        while (piece := await in_thread(next, plain, None)) is not None:
            yield piece


def _for_each(pieces: Iterator[bytes], write: Callable[[bytes], object]) -> None:
    for piece in pieces:
        write(piece)


class WalArchive:
    """Stores and reads the WAL files of one repository, packed in its format."""

    def __init__(self, store: ObjectStore, objects: ObjectFormat, *, digest_is_kept: bool = False) -> None:
        """Work on `store`, its objects packed as `objects`; `digest_is_kept` as `WalPacker`."""
        self._store = store
        self._objects = objects
        self._listed = ListedNames(store)
        self.packer = WalPacker(objects, digest_is_kept=digest_is_kept)
        self._likely_extension = objects.extension

    async def foresee(self, name: str) -> None:
        """Ask now, while the WAL file is packed, what `store` has to know of other objects of its name.

        Raises:
            RepositoryError: The repository could not be asked.
        """
        await self._listed.objects(name)

    async def store(self, packed: Packed) -> Stored:
        """Store what was packed as a whole: `store_stream` tells the rest."""

        async def put(key: str, metadata: Mapping[str, str]) -> int | None:
            is_new = await self._store.put_if_absent(key, packed.body, metadata=metadata)
            return len(packed.body) if is_new else None

        return await self._store_by(put, packed.description)

    async def store_stream(self, description: Description, chunks: AsyncIterator[bytes]) -> Stored:
        """Return once the content, packed as `chunks`, is durable in the repository under its name.

        Storing the same content twice succeeds: PostgreSQL asks again when it crashed before it could record our
        answer. Source: PostgreSQL docs, "Setting Up WAL Archiving".

        Raises:
            WalConflict: The repository holds other content under this name, with whatever extension.
            RepositoryError: It could not be stored, or that could not be confirmed.
        """

        async def put(key: str, metadata: Mapping[str, str]) -> int | None:
            return await self._store.put_stream_if_absent(key, chunks, metadata=metadata)

        return await self._store_by(put, description)

    async def _store_by(
        self, put: Callable[[str, Mapping[str, str]], Awaitable[int | None]], description: Description
    ) -> Stored:
        name = description.name
        held = [] if await self._listed.objects(name) == 0 else await self.find(name)
        if not held:
            stored_bytes = await put(wal_key(name, self._objects.extension), description.metadata)
            if stored_bytes is not None:
                return Stored(stored_bytes, already=False)
            held = await self.find(name)
        if not held:
            raise _gone(name)
        for item in held:
            await self._require_same(item, description)
        return Stored(0, already=True)

    async def _require_same(self, item: WalObject, description: Description) -> None:
        held = await self._held(item)
        if held.digest != description.digest:
            whose = f" of database cluster {held.owner}" if held.owner else ""
            raise WalConflict(
                f'WAL file "{description.name}" is already archived with other content{whose} '
                f"since {held.info.modified_at:%Y-%m-%d %H:%M:%S} UTC",
                hint="Another server archives into this repository: give one of them another WALG_S3_PREFIX.",
            )

    async def _held(self, item: WalObject) -> "_Held":
        """Tell what content an object has, by its metadata; by reading it where it has none."""
        info = await self._store.head(item.key)
        if info is None:
            raise _gone(item.name)
        if (digest := info.metadata.get(DIGEST)) is not None:
            return _Held(info, digest, info.metadata.get(SYSTEM_IDENTIFIER))
        # Stored by WAL-G, or in a store that keeps no metadata.
        async with self._store.open(item.key) as opened:
            if opened is None:
                raise _gone(item.name)
            content = await OpenWal(item.name, opened, self._objects, None).read(lambda _piece: None)
        is_segment = item.kind in (WalFileKind.SEGMENT, WalFileKind.PARTIAL)
        owner = str(parse_segment_header(content.head).system_identifier) if is_segment else None
        return _Held(info, content.hexdigest(), owner)

    async def require_one_content(self, name: str) -> None:
        """Return unless two objects hold the WAL file `name`, and not the same; one listing tells of many segments.

        A conditional PUT guards one key. Two servers that compress differently may store two.

        Raises:
            RepositoryCorrupt: They have different content: which is the right one, nobody knows.
            RepositoryError: The repository could not be asked.
        """
        if (objects := await self._listed.objects(name)) is not None and objects < 2:
            return
        items = await self.find(name)
        held = [await self._held(item) for item in items] if len(items) > 1 else []
        if len({one.digest for one in held}) > 1:
            them = " and ".join(f"{one.info.key} of {one.info.modified_at:%Y-%m-%d %H:%M:%S} UTC" for one in held)
            raise RepositoryCorrupt(
                f'WAL file "{name}" is archived with two contents: {them}',
                hint="Two servers archived into this repository: move away the object of the one that is not wanted.",
            )

    async def find(self, name: str) -> list[WalObject]:
        """Return the objects that hold the WAL file `name`: its exact name with any known extension."""
        found = [parse_wal_object(info) async for info in self._store.list(WAL_FOLDER + name)]
        return [item for item in found if item is not None and item.name == name]

    async def deleted(self, name: str, system_identifier: int | None = None) -> str | None:
        """Name the object that held the WAL file `name` and was deleted, and its version; None if none is known.

        What says that it was of another database cluster than the one given does not count: a prefix that was emptied
        and is used again hides the WAL of its earlier life.
        """
        versions = await self._store.deleted_versions(WAL_FOLDER + name)
        own = None if system_identifier is None else str(system_identifier)
        for key in (wal_key(name, extension) for extension in EXTENSIONS):
            if (found := versions.get(key)) and own in (None, found.metadata.get(SYSTEM_IDENTIFIER, own)):
                return f"{key}, version {found.version}"
        return None

    async def times(self, name: str) -> SegmentTimes | None:
        """Return when transactions ended in the archived segment `name`, with one HEAD as a rule.

        None if that is not known without reading the segment: WAL-G stored it, it was not certain when it was archived,
        or it is not there.

        Raises:
            RepositoryError: The repository could not be asked.
        """
        return read_times(await self._metadata(name))

    async def content_bytes(self, name: str) -> int | None:
        """Return the plain size of the archived WAL file `name`; None under the same conditions as `times`."""
        return read_content_bytes(await self._metadata(name))

    async def _metadata(self, name: str) -> Mapping[str, str]:
        info = await self._store.head(wal_key(name, self._likely_extension))
        if info is None:
            for item in await self.find(name):
                if (info := await self._store.head(item.key)) is not None:
                    self._likely_extension = item.extension
                    break
        return {} if info is None else info.metadata

    async def fetch(self, name: str, system_identifier: int | None = None) -> bytes | None:
        """Return the checked content of the WAL file `name`, or None if no such file is archived.

        Raises:
            RepositoryCorrupt: What is stored is damaged, or is not that file (of that database cluster, if given).
            RepositoryError: It could not be read.
        """
        return await read_twice(lambda: self._fetch(name, system_identifier), "wal fetched again", wal_file=name)

    async def _fetch(self, name: str, system_identifier: int | None) -> bytes | None:
        pieces: list[bytes] = []
        downloaded = await self.download(name, pieces.append, system_identifier)
        return None if downloaded is None else await in_thread(b"".join, pieces)

    async def segment_header(self, name: str, system_identifier: int | None = None) -> SegmentHeader | None:
        """Return what the segment `name` says of itself, checked as `fetch` does; memory does not depend on its size.

        Raises:
            RepositoryError: As `fetch`.
        """

        async def read() -> SegmentHeader | None:
            async with self.open(name, system_identifier) as wal:
                return None if wal is None else parse_segment_header((await wal.read(lambda _piece: None)).head)

        return await read_twice(read, "wal fetched again", wal_file=name)

    async def read_times(self, name: str, system_identifier: int | None = None) -> SegmentTimes | None:
        """Return when transactions ended in the archived segment `name`, which is read; None if that is not certain.

        Memory does not depend on its size: it is kept in a temporary file meanwhile.

        Raises:
            ConfigError: There is no room for that.
            RepositoryError: As `fetch`; also if it is not there.
        """
        return await read_twice(lambda: self._read_times(name, system_identifier), "wal fetched again", wal_file=name)

    async def _read_times(self, name: str, system_identifier: int | None) -> SegmentTimes | None:
        try:
            with TemporaryFile() as file:
                downloaded = await self.download(name, file.write, system_identifier)
                if downloaded is None:
                    raise gone(name)
                await in_thread(file.flush)
                return await in_thread(
                    segment_times_of, downloaded.size, lambda begin, end: os.pread(file.fileno(), end - begin, begin)
                )
        except OSError as error:
            raise ConfigError(
                f'WAL segment "{name}" cannot be kept in a temporary file in {tempfile.gettempdir()}: {error.strerror}',
                hint="Make room there, or set TMPDIR to a directory that has some.",
            ) from error

    async def download(
        self,
        name: str,
        write: Callable[[bytes], object],
        system_identifier: int | None = None,
        *,
        executor: Executor | None = None,
    ) -> Downloaded | None:
        """Hand the content of the WAL file `name` to `write`, piece by piece; return None if it is absent.

        `write` is called in threads (of `executor`). The content has been checked when this returns, and not before.

        Raises:
            RepositoryCorrupt: What is stored is damaged, or is not that file (of that database cluster, if given).
            RepositoryError: It could not be read.
        """
        async with self.open(name, system_identifier) as wal:
            if wal is None:
                return None
            content = await wal.read(write, executor=executor)
        return Downloaded(content.size, content.records)

    @asynccontextmanager
    async def open(self, name: str, system_identifier: int | None = None) -> AsyncIterator["OpenWal | None"]:
        """Open the WAL file `name` to be read once, of that database cluster; the context is None if it is absent.

        Raises:
            RepositoryError: The repository could not be asked.
        """
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(self._store.open(wal_key(name, self._likely_extension)))
            if opened is None:
                found = await self.find(name)
                for item in found:
                    opened = await stack.enter_async_context(self._store.open(item.key))
                    if opened is not None:
                        self._likely_extension = item.extension
                        break
                if found and opened is None:
                    raise _gone(name)
            yield None if opened is None else OpenWal(name, opened, self._objects, system_identifier)

    async def first_file(self, *, after: str = "") -> WalObject | None:
        """Return the archived WAL file with the lowest name greater than `after`; None if there is none."""
        async for info in self._store.list(WAL_FOLDER, after=f"{WAL_FOLDER}{after}" if after else ""):
            if (item := parse_wal_object(info)) is not None:
                return item
        return None

    async def next_segment(self, name: str) -> str | None:
        """Name the first archived segment after `name` on its timeline; None if there is none."""
        async for info in self._store.list(WAL_FOLDER + name[:8], after=f"{WAL_FOLDER}{name}~"):
            if (item := parse_wal_object(info)) is not None and item.kind is WalFileKind.SEGMENT:
                return item.name
        return None

    async def list_files(self, after: str = "", *, cuts: Sequence[str] = ()) -> list[WalObject]:
        """Return the archived WAL files with a name greater than `after`, by name, each name once.

        `cuts`: names between which the listing is cut into pieces that are listed at once. A listing comes a thousand
        names at a time, one page after the other: it is what takes longest in a large archive.
        """
        starts = ["", *sorted({cut for cut in cuts if cut > after})]
        limit = asyncio.Semaphore(_LISTINGS_AT_ONCE)
        files: dict[str, WalObject] = {}

        async def collect(start: str, stop: str | None) -> None:
            begin = f"{WAL_FOLDER}{start}" if start else f"{WAL_FOLDER}{after}~" if after else ""
            async with limit:
                async for info in self._store.list(WAL_FOLDER, after=begin):
                    if stop is not None and info.key > f"{WAL_FOLDER}{stop}":
                        break
                    if (item := parse_wal_object(info)) is not None:
                        files.setdefault(item.name, item)

        async with task_group() as group:
            for start, stop in zip_longest(starts, starts[1:]):
                group.create_task(collect(start, stop), name=f"list WAL after {start}")
        return [files[name] for name in sorted(files)]

    async def histories(
        self, names: Sequence[str] | None = None, *, damaged: list[RepositoryCorrupt] | None = None
    ) -> dict[int, tuple[Ancestor, ...]]:
        """Return the archived timeline histories: timeline to its ancestors, oldest first.

        names: of the archived WAL files, if they are known; they are listed otherwise.
        damaged: collects the errors of those that are damaged, which are then passed over.

        Raises:
            RepositoryCorrupt: One is damaged, and there is no `damaged`.
            RepositoryError: The repository could not be read.
        """
        if names is None:
            names = [item.name for item in await self.list_files()]
        result: dict[int, tuple[Ancestor, ...]] = {}
        for name in names:
            if wal_file_kind(name) is not WalFileKind.HISTORY:
                continue
            try:
                if (ancestors := await self._history(name)) is not None:
                    result[int(name[:8], 16)] = ancestors
            except RepositoryCorrupt as error:
                if damaged is None:
                    raise
                damaged.append(error)
        return result

    async def _history(self, name: str) -> tuple[Ancestor, ...] | None:
        content = await self.fetch(name)
        try:
            return None if content is None else parse_history(int(name[:8], 16), content.decode("utf-8", "replace"))
        except ValueError as error:
            raise RepositoryCorrupt(
                f"history file {name} is damaged: {error}", hint="Put a good copy back into the repository."
            ) from error
