"""The files of a base backup, as far as a delta on top of it has to know them: names and modification times.

`files_metadata.json` is read as it arrives and kept as hashes: 16 bytes a file, so that two million files take 32 MB,
where the document's text alone takes 600. They are Python's, of 64 bits and another in each process. That two of two
million names share one happens once in nine million deltas; then a change is missed only if their times are equal, too.
"""

import codecs
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.documents import parse_nanoseconds
from agent.repository.keys import files_metadata_key
from agent.repository.pieces import take_pieces
from agent.tasks import in_thread

_MAX_PENDING = 4 << 20  # characters that one entry may take
_NO_TIME = -(1 << 63)
_DECODER = json.JSONDecoder()
_BETWEEN = ", \t\r\n"
_OPENING = re.compile(r"\s*\{")
_CLOSING = re.compile(r"\s*\}")
_NAME = re.compile(r'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*(?=\S)')
_SET_ITEM = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")\s*(?=\S)(:?)|null|([\[\],}]))')


class ParentFiles:
    """Which files a base backup has, with their times. First all are added, then `seal`, then it is asked."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._times = array("q")

    def __len__(self) -> int:
        return len(self._times)

    def add(self, name: str, mtime_ns: int | None) -> None:
        """Add the tar member `name`, modified at `mtime_ns` (nanoseconds since 1970; None: not recorded).

        A time before 1678 or after 2261 counts as not recorded.
        """
        self._hashes.append(hash(name))
        self._times.append(_NO_TIME if mtime_ns is None or abs(mtime_ns) >= -_NO_TIME else mtime_ns)

    def seal(self) -> None:
        """Make it ready to be asked."""
        import numpy as np  # takes a tenth of a second and 15 MiB: not for those who take no deltas

        order = np.argsort(np.frombuffer(self._hashes, np.int64))
        for values in (self._hashes, self._times):
            view = np.frombuffer(values, np.int64)
            view[:] = view[order]

    def __contains__(self, name: str) -> bool:
        return self._position(name) is not None

    def mtime_ns(self, name: str) -> int | None:
        """Return the modification time of the file `name`; None if it is not there, or its time was not recorded."""
        position = self._position(name)
        return None if position is None or self._times[position] == _NO_TIME else self._times[position]

    def _position(self, name: str) -> int | None:
        wanted = hash(name)
        position = bisect_left(self._hashes, wanted)
        return position if position < len(self) and self._hashes[position] == wanted else None


async def read_parent_files(store: ObjectStore, name: str) -> ParentFiles | None:
    """Return the files that `files_metadata.json` of the base backup `name` lists, or None if there is no such object.

    Those that had damaged pages are left out, so that they are stored anew: what was read badly, or was repaired since
    from a copy with the same LSNs, is not inherited.

    Raises:
        RepositoryCorrupt: It cannot be understood.
        RepositoryError: It could not be read.
    """
    key = files_metadata_key(name)
    result, reader = ParentFiles(), FilesReader(key)

    def take(piece: bytes) -> None:
        for file, description in reader.take(piece):
            mtime_ns = _mtime_ns(key, file, description)
            if not description.get("CorruptBlocks"):
                result.add(file, mtime_ns)

    if not await take_pieces(store, key, take):
        return None
    reader.finish()
    await in_thread(result.seal)
    return result


def _mtime_ns(key: str, file: str, description: Any) -> int | None:
    try:
        text = description.get("MTime")
        return None if text is None else parse_nanoseconds(text)
    except (AttributeError, TypeError, ValueError):
        raise _corrupt(key, f"its description of {file[:200]} cannot be understood") from None


def file_flags(key: str, name: str, description: Any) -> tuple[bool, bool]:
    """Tell of the file `name`, as its `description` in the object `key` says, whether it is incremented, and skipped.

    Raises:
        RepositoryCorrupt: That cannot be understood.
    """
    fields: Mapping[str, Any] = description if isinstance(description, dict) else {"IsSkipped": None}
    incremented, skipped = fields.get("IsIncremented", False), fields.get("IsSkipped", False)
    if not (isinstance(incremented, bool) and isinstance(skipped, bool)) or (incremented and skipped):
        raise RepositoryCorrupt(
            f"{key}: its description of {name[:200]} cannot be understood",
            hint="Bring back a copy of the object, or use another backup.",
        )
    return incremented, skipped


def _corrupt(key: str, problem: str) -> RepositoryCorrupt:
    return RepositoryCorrupt(f"{key}: {problem}", hint="Bring back a copy of the object, or take a full base backup.")


class FilesReader:
    """Reads the entries of `Files` out of a `files_metadata.json` that arrives in pieces. `key` is its name.

    With `on_member` it goes on to `TarFileSets`, and calls that with each tar and each name in it. WAL-G writes the two
    in this order, as we do.

    What a piece completes is parsed at once, in less than half the time that the entries one by one take. Cut at the
    wrong place, in a string or between the brackets of an entry, it is no JSON; then they are read one by one.
    """

    def __init__(self, key: str, on_member: Callable[[str, str], None] | None = None) -> None:
        self._key = key
        self._on_member = on_member
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._pending = ""
        self._depth = 0  # 1: in the document, 2: in its Files, 3: in its TarFileSets
        self._tar = ""
        self._is_in_tar = False
        self._tried = 0  # until where much at once has been tried
        self._ended = False

    def take(self, piece: bytes) -> Iterator[tuple[str, Any]]:
        """Yield the entries that are complete with the next bytes: name and description."""
        try:
            self._pending += self._decode.decode(piece)
        except UnicodeDecodeError:
            raise _corrupt(self._key, "it is not UTF-8") from None
        position = self._tried = 0
        try:
            while not self._ended and (found := self._many(position) or self._next(position)) is not None:
                position, entries = found
                yield from entries
        except (ValueError, RecursionError):
            raise self._not_json() from None
        self._pending = "" if self._ended else self._pending[position:]
        if len(self._pending) > _MAX_PENDING:
            raise self._not_json()

    def finish(self) -> None:
        """Return if all entries were read, else raise `RepositoryCorrupt`."""
        if not self._ended:
            raise _corrupt(self._key, "it is cut short, or not JSON")

    def _not_json(self) -> RepositoryCorrupt:
        return _corrupt(self._key, "it is not JSON, or not what WAL-G writes")

    def _many(self, position: int) -> tuple[int, Iterable[tuple[str, Any]]] | None:
        """As `_next` for all entries that are here; None if they have to be read one by one."""
        text = self._pending
        if position < self._tried or not (self._depth == 2 or self._is_in_tar):
            return None
        if self._depth == 2:
            end = text.rfind("},", position) + 1
        elif (end := text.find("]", position)) < 0:
            end = text.rfind('",', position) + 1
        if end <= position:
            return None
        self._tried = end
        items = text[position:end].lstrip(_BETWEEN)
        try:
            if self._depth == 2:
                return end, json.loads(f"{{{items}}}").items()
            names = json.loads(f"[{items}]")
        except ValueError:
            return None
        if self._on_member is None or not all(isinstance(name, str) for name in names):
            return None
        for name in names:
            self._on_member(self._tar, name)
        return end, ()

    def _next(self, position: int) -> tuple[int, Iterable[tuple[str, Any]]] | None:
        """Return where the next entry ends, and the entry if it is one of `Files`; None if it is not all here yet."""
        text = self._pending
        if not self._depth:
            opening = _OPENING.match(text, position)
            self._depth = 1 if opening else 0
            return (opening.end(), ()) if opening else None
        if self._depth == 3:
            return self._next_member(position)
        if closing := _CLOSING.match(text, position):
            self._ended = self._depth == 1 or self._on_member is None
            self._depth = 1
            return closing.end(), ()
        name = _NAME.match(text, position)
        if name is None:
            return None
        if self._depth == 1 and text[name.end()] == "{" and (depth := self._depth_of(json.loads(name[1]))):
            self._depth = depth
            return name.end() + 1, ()
        try:
            value, end = _DECODER.raw_decode(text, name.end())
        except ValueError:
            return None
        return end, [(json.loads(name[1]), value)] if self._depth == 2 else ()

    def _depth_of(self, name: str) -> int:
        return 2 if name == "Files" else 3 if name == "TarFileSets" and self._on_member is not None else 0

    def _next_member(self, position: int) -> tuple[int, Iterable[tuple[str, Any]]] | None:
        item = _SET_ITEM.match(self._pending, position)
        if item is None:
            return None
        text, colon, mark = item.groups()
        self._is_in_tar = mark == "[" or (self._is_in_tar and mark != "]")
        if mark == "}":
            self._depth = 1
        elif colon:
            self._tar = json.loads(text)
        elif text and self._on_member is not None:
            self._on_member(self._tar, json.loads(text))
        return item.end(), ()
