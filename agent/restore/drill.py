"""A restore drill: the newest base backup restored to a moment picked at random, checked, and thrown away.

It is an ordinary restore whose marker says that it is a drill. Only a directory with such a marker is ever emptied, and
only where nothing runs; the marker goes last, so that what a killed drill left is recognised by the next.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from agent.domain.drill import DrillChoice, choose_drill
from agent.errors import ConfigError, NoRestorePath
from agent.ports import ObjectStore
from agent.postgres.durable import locked_directory, remove_durably
from agent.repository.backups import read_catalog, read_sentinel
from agent.repository.wal_archive import WalArchive
from agent.repository.wal_index import list_wal
from agent.restore.marker import DRILL, MARKER_NAME, read_marker
from agent.restore.outcome import RestoreOutcome
from agent.restore.tablespaces import remove_tree
from agent.settings import RestoreAs, Settings

_TABLESPACES_SUFFIX = ".tablespaces"  # beside the data directory: on the scratch volume, too
_LEFT = frozenset({"lost+found", MARKER_NAME})


@dataclass(frozen=True, slots=True)
class DrillOutcome:
    """What a drill proved.

    moment: the moment that was restored.
    seconds: how long a restore took, from planning to the promoted, stopped server.
    restored: all the rest; its directory is gone.
    """

    moment: datetime
    seconds: float
    restored: RestoreOutcome


async def plan_drill(store: ObjectStore, archive: WalArchive, share: float) -> DrillChoice:
    """Choose what the drill restores; see `choose_drill` about `share`.

    Raises:
        NoRestorePath: No base backup can be used.
        RepositoryError: The repository could not be read.
    """
    wal = await list_wal(archive, await read_catalog(store))
    choice = await wal.index.follow(choose_drill(wal.held, share))
    if choice is None:
        raise NoRestorePath(
            "no base backup of the latest timeline can be restored", hint="`pitr window` and `pitr verify` say why."
        )
    return choice


async def drill_settings(store: ObjectStore, settings: Settings, choice: DrillChoice) -> Settings:
    """Return the settings of the restore that the drill is.

    It never archives, and its tablespaces go beside PGDATA, unless PITR_TABLESPACE_MAP names a directory: where they
    were, the original may be.
    """
    path = settings.require_data_directory()
    beside = path.with_name(path.name + _TABLESPACES_SUFFIX)
    stored = (await read_sentinel(store, choice.backup)).tablespaces
    tablespaces = {location.rstrip("/"): str(beside / str(oid)) for oid, location in stored.items()}
    return replace(
        settings,
        is_drill=True,
        auto_start=True,
        archive_after_restore=False,
        restore_delta=False,
        restore_as=RestoreAs.PRIMARY,
        backup_name=choice.backup,
        target=choice.target,
        tablespace_map={**tablespaces, **settings.tablespace_map},
    )


def discard_drill(data_directory: Path, tablespace_map: Mapping[str, str]) -> None:
    """Remove what a drill left in `data_directory` and its tablespaces; nothing to do if there is no marker.

    Blocks for file I/O.

    Raises:
        ConfigError: The marker is of a restore that is no drill, or another drill, or a server, is at work there.
        OSError: Something cannot be removed.
    """
    marker = read_marker(data_directory)
    if marker is None:
        return
    if DRILL not in marker.request:
        raise ConfigError(
            f"{data_directory} holds a restore that is no drill ({marker.stage})",
            hint="Let PGDATA of the drill be an empty directory on a volume of its own.",
        )
    try:
        with locked_directory(data_directory):
            _require_no_server(data_directory)
            for directory in map(Path, tablespace_map.values()):
                _empty(directory)
            _empty(data_directory)
            remove_durably(data_directory / MARKER_NAME)
    except BlockingIOError:
        raise ConfigError(f"another drill is at work in {data_directory}", hint="Wait until it has ended.") from None


def left_by_a_drill(data_directory: Path) -> dict[str, str]:
    """Return the tablespace map of what a drill left in `data_directory`, empty if there is nothing."""
    marker = read_marker(data_directory)
    told = marker.request.get("tablespace_map") if marker is not None else None
    return dict(json.loads(told)) if told else {}


def _require_no_server(data_directory: Path) -> None:
    """A server's working directory is its data directory. Source: PostgreSQL's ChangeToDataDir(), miscinit.c."""
    try:
        pid = (data_directory / "postmaster.pid").read_text().split("\n", 1)[0]
        is_running = Path(f"/proc/{int(pid)}/cwd").readlink() == data_directory.resolve()
    except (OSError, ValueError):
        return
    if is_running:
        raise ConfigError(
            f"a PostgreSQL server runs in {data_directory} (process {pid})", hint="A drill never ends a server."
        )


def _empty(directory: Path) -> None:
    if directory.is_dir():
        for path in list(directory.iterdir()):
            if path.name not in _LEFT:
                remove_tree(path)
