"""Reads the restorable window of a repository: the catalog, one listing of the WAL, and the times of a few segments."""

from dataclasses import dataclass

from agent.domain.archived_path import Holdings
from agent.domain.window import Window, restorable_window
from agent.ports import ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import list_wal


@dataclass(frozen=True, slots=True)
class WindowView:
    """The window, and what the repository held when it was worked out."""

    window: Window
    held: Holdings


async def read_window(store: ObjectStore, archive: WalArchive) -> WindowView:
    """Return what the repository can restore now.

    Raises:
        RepositoryError: It could not be read.
    """
    wal = await list_wal(archive, await read_catalog(store))
    return WindowView(await wal.index.follow(restorable_window(wal.held)), wal.held)
