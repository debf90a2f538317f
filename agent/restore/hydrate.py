"""Fills a data directory from base backups.

Two steps, so that recovery settings are in place before PostgreSQL can start:

    claim(directory) -> [marker] -> hydrate(...) -> [recovery settings, signal file] -> finish(directory)

Invariants:
    Only a directory that is empty, or that carries our marker and no `global/pg_control`, is written to.
    Until `finish` there is no `global/pg_control`: PostgreSQL cannot start on half a database.
    What `hydrate` wrote is durable when it returns.
"""

from collections.abc import Mapping
from pathlib import Path

from agent.domain.restore_plan import RestorePlan
from agent.ports import ObjectStore
from agent.telemetry.progress import ReportProgress


async def claim(data_directory: Path) -> None:
    """Return if `data_directory` may be restored into: it is absent (it is made then) or holds nothing of anybody.

    To be called before the marker is written: a directory with our marker and no `global/pg_control` is wiped by
    `hydrate`. `lost+found` is nobody's.

    Raises:
        ConfigError: It holds something, or cannot be made or written.
    """
    raise NotImplementedError


async def hydrate(
    store: ObjectStore,
    plan: RestorePlan,
    data_directory: Path,
    *,
    tablespace_map: Mapping[str, str],
    concurrency: int,
    report: ReportProgress,
) -> None:
    """Put all files of the plan's base backups into `data_directory`, `global/pg_control` under a temporary name.

    Everything left by an earlier, interrupted call is removed first. Stale state (signal files, postmaster.pid, an
    earlier label) is left out. What is written is durable on return.

    Args:
        store: The repository.
        plan: Which base backups.
        data_directory: A claimed directory, see `claim`.
        tablespace_map: Directory that a tablespace was in, to the one it goes to; others go back to where they were.
        concurrency: Tar parts downloaded and unpacked at once.
        report: Is told the compressed bytes read so far.

    Raises:
        ConfigError: The directory, or one of a tablespace, cannot be used.
        RepositoryError: An object cannot be read, is damaged, or a file that the backup lists has not arrived.
    """
    raise NotImplementedError


async def finish(data_directory: Path) -> None:
    """Put `global/pg_control` in its place: the last step, after which PostgreSQL can start. Durable on return.

    Raises:
        RestoreFailed: `hydrate` has not completed here.
    """
    raise NotImplementedError
