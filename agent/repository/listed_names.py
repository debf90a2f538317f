"""Tells of many WAL segments by one listing how many objects have their name, under whatever extension.

A conditional PUT guards one key, so a name under another extension (a bucket that WAL-G wrote, other settings) has to
be looked for before a segment is stored; and before one is handed to recovery, for two servers that compress
differently may both have stored it. A backlog, or a recovery, asks for one name after the other: what one listing found
need not be asked for each.
"""

import asyncio
from collections import Counter
from contextlib import aclosing

from agent.domain.wal import WalFileKind, wal_file_kind
from agent.ports import ObjectStore
from agent.repository.keys import WAL_FOLDER

FRESH_SECONDS = 10.0
"""How long a listing is believed. Only a server that is told to compress differently could meanwhile prove it wrong."""

_LISTED = 1000  # at most: what S3 answers at once
_NAME_CHARACTERS = 24
_TIMELINE_CHARACTERS = 8


class ListedNames:
    """Remembers the last listing. For use by any number of tasks."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._asking = asyncio.Lock()
        self._found: Counter[str] = Counter()
        self._first = self._end = ""
        self._asked_at = 0.0

    async def objects(self, name: str) -> int | None:
        """Return how many objects a listing, now or just before, found whose name begins with that of a WAL segment.

        Of the other kinds of WAL files, which are few, nothing is remembered: None.

        Raises:
            RepositoryError: It could not be listed.
        """
        if wal_file_kind(name) is not WalFileKind.SEGMENT:
            return None
        async with self._asking:  # whoever comes meanwhile shares the answer
            if not self._tells_of(name):
                await self._list(name)
            return self._found[name]

    def _tells_of(self, name: str) -> bool:
        return self._first <= name < self._end and _now() - self._asked_at < FRESH_SECONDS

    async def _list(self, name: str) -> None:
        asked_at, timeline, found = _now(), name[:_TIMELINE_CHARACTERS], []
        # After something smaller than the name itself, which is the key of an object that is not compressed.
        objects = self._store.list(WAL_FOLDER + timeline, after=WAL_FOLDER + name[:-1])
        async with aclosing(objects):  # type: ignore[type-var]  # every store's is a generator
            async for info in objects:
                found.append(info.key[len(WAL_FOLDER) :][:_NAME_CHARACTERS])
                if len(found) == _LISTED:
                    break
        self._found, self._asked_at = Counter(found), asked_at
        self._first, self._end = name, found[-1] if len(found) == _LISTED else timeline + "~"


def _now() -> float:
    return asyncio.get_running_loop().time()
