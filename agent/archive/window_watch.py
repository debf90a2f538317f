"""Keeps the restorable window known while the agent runs, cheaply.

The WAL is listed whole at the start, once an hour, and when the set of base backups has changed (an expiry removes WAL,
too); every minute only what is new is listed, and asked for its times: two or three requests.
"""

import asyncio
from collections.abc import Sequence

import structlog

from agent.domain.archived_path import Holdings
from agent.domain.catalog import Backup
from agent.domain.timeline import Ancestor
from agent.domain.wal import WalFileKind
from agent.domain.wal_runs import add_segment, merged
from agent.domain.window import restorable_window
from agent.errors import RepositoryError
from agent.ports import Clock, ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.keys import BACKUP_FOLDER, WAL_FOLDER, backup_name_of_sentinel
from agent.repository.wal_archive import WalArchive, parse_wal_object
from agent.repository.wal_index import WalIndex, segment_size
from agent.repository.window import WindowView
from agent.repository.window_status import window_status
from agent.tasks import first_of
from agent.telemetry.status import WindowStatus

REFRESH_SECONDS = 60.0
RELIST_SECONDS = 3600.0

log = structlog.get_logger()


class WindowWatch:
    """Works out the window again and again. Run it as a service.

    view: the window when it was last looked at, None before.
    """

    name = "window watch"

    def __init__(self, store: ObjectStore, archive: WalArchive, clock: Clock) -> None:
        self.view: WindowView | None = None
        self._store = store
        self._archive = archive
        self._clock = clock
        self._status: WindowStatus | None = None
        self._wake = asyncio.Event()
        self._index: WalIndex | None = None
        self._sentinels: tuple[str, ...] | None = None
        self._backups: Sequence[Backup] = ()
        self._wal: dict[int, list[range]] = {}
        self._histories: dict[int, tuple[Ancestor, ...]] = {}
        self._segment_bytes = 0
        self._last_name = ""
        self._listed_at = 0.0
        self._is_blind = False

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self.refresh()
                self._is_blind = False
            except RepositoryError as error:
                if not self._is_blind:
                    log.warning("restorable window cannot be told", reason=error.one_line())
                self._is_blind = True
            await first_of(self._clock.sleep(REFRESH_SECONDS), self._wake.wait())
            self._wake.clear()

    def look_again(self) -> None:
        """Look soon: base backups came or went. Returns at once."""
        self._wake.set()

    def status(self) -> WindowStatus | None:
        """Say what an ordinary restore has to choose from now; None if that is not known yet."""
        return self._status

    async def refresh(self) -> WindowView:
        """Look at what is new in the repository; return the window.

        Raises:
            RepositoryError: The repository could not be read.
        """
        sentinels = tuple(
            [i.key async for i in self._store.list_folder(BACKUP_FOLDER) if backup_name_of_sentinel(i.key)]
        )
        if sentinels != self._sentinels:
            self._backups = await read_catalog(self._store)
        is_due = self._clock.monotonic() >= self._listed_at + RELIST_SECONDS
        if sentinels != self._sentinels or is_due or not self._segment_bytes:
            self._wal, self._histories, self._last_name = {}, {}, ""
            self._listed_at = self._clock.monotonic()
        await self._list()
        held = Holdings(self._backups, dict(self._histories), dict(self._wal), self._segment_bytes)
        if self._index is None and self._segment_bytes:
            self._index = WalIndex(self._archive, self._system_identifier(), self._segment_bytes)
        index = self._index or WalIndex(self._archive, None, 0)
        self.view = WindowView(await index.follow(restorable_window(held)), held)
        self._status = window_status(self.view, self._clock.now())
        self._sentinels = sentinels  # last: what failed half-way is done again
        return self.view

    def _system_identifier(self) -> int | None:
        return next((each.system_identifier for each in self._backups if each.system_identifier is not None), None)

    async def _list(self) -> None:
        """Add what is archived under a later name than the last one that was listed."""
        found: dict[int, list[range]] = {}
        histories: list[str] = []
        newest = self._last_name
        after = f"{WAL_FOLDER}{newest}~" if newest else ""
        async for info in self._store.list(WAL_FOLDER, after=after):
            item = parse_wal_object(info)
            if item is None:
                continue
            if item.kind is WalFileKind.HISTORY:
                histories.append(item.name)
            elif item.kind is WalFileKind.SEGMENT:
                if not self._segment_bytes:
                    self._segment_bytes = await segment_size(self._archive, item.name, self._system_identifier())
                add_segment(found, item.name, self._segment_bytes)
                newest = item.name
        self._histories |= await self._archive.histories(histories)
        for timeline, ranges in found.items():
            self._wal[timeline] = merged([*self._wal.get(timeline, ()), *ranges])
        self._last_name = newest  # after the rest: what failed half-way is listed again
