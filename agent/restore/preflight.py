"""What would keep a plan from being carried out on this machine: asked before anything is downloaded, told all at once.

Nothing is made or changed here. What PostgreSQL must be given at least as much of as the primary has needs no check:
recovery runs with `hot_standby = off`, and with the primary's number of prepared transactions (see `Postmaster`); a
standby is given what the primary has (see `raised_limits`).
"""

import os
import shutil
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.domain.restore_plan import RestorePlan
from agent.errors import ConfigError, PreflightFailed
from agent.ports import ObjectStore
from agent.postgres.postmaster import find_postgres
from agent.repository.backups import read_sentinel
from agent.restore.existing import holds_data, require_same_cluster
from agent.restore.hydrate import EMPTY_HINT, is_writable
from agent.restore.marker import NOBODYS, read_marker, require_same_request, restore_request
from agent.restore.standby import standby_problems
from agent.restore.tablespaces import CLAIM, is_linked, tablespace_directories
from agent.restore.validation import require_checks_possible
from agent.settings import RestoreAs, Settings
from agent.tasks import in_thread

_SPARE = 1.1  # of what is restored must be free
_WAL_SEGMENTS = 16  # that PostgreSQL and the read-ahead keep in pg_wal while replay goes on
_MIB = 1 << 20
_VALIDATION_NEEDS_A_SERVER = ConfigError(
    "PITR_VALIDATE_SQL or PITR_VALIDATE is set, but not AUTO_START: there is no server to check",
    hint="Set AUTO_START=true, or unset them.",
)


@dataclass(frozen=True, slots=True)
class _Volume:
    """A mounted file system: where it was met, and how many bytes are free for this user."""

    path: Path
    free_bytes: int


async def require_possible(store: ObjectStore, settings: Settings, plan: RestorePlan) -> None:
    """Return if `plan` can be carried out here.

    Raises:
        PreflightFailed: It cannot; holds every reason with its next step.
        RepositoryError: The sentinel could not be read.
    """
    if problems := await preflight(store, settings, plan):
        raise PreflightFailed(problems)


async def preflight(store: ObjectStore, settings: Settings, plan: RestorePlan) -> list[ConfigError]:
    """Return what keeps `plan` from being carried out here, empty if nothing does; see `require_possible`."""
    path = settings.require_data_directory().absolute()
    stored = (await read_sentinel(store, plan.backup.name)).tablespaces
    checks = [in_thread(_check_directory, path, settings, plan)]
    problems = standby_problems(settings)
    if settings.validation and not settings.auto_start and settings.restore_as is not RestoreAs.STANDBY:
        problems.append(_VALIDATION_NEEDS_A_SERVER)
    if settings.auto_start:
        checks += [_find_postgres(plan, settings), in_thread(_check_hook, settings.hook_directory)]
    problems += [problem for check in checks if (problem := await _problem_of(check)) is not None]
    try:
        directories = tablespace_directories(stored, settings.tablespace_map, path)
    except ConfigError as error:
        return [*problems, error]
    for directory in directories.values():
        problem = await _problem_of(in_thread(_check_tablespace, directory, path, settings))
        problems += [problem] if problem is not None else []
    if not problems and not await in_thread(_is_begun, path):
        problem = await _problem_of(in_thread(_check_space, plan, [path, *directories.values()]))
        problems += [problem] if problem is not None else []
    return problems


async def _problem_of(check: Awaitable[None]) -> ConfigError | None:
    try:
        await check
    except ConfigError as error:
        return error
    except OSError as error:
        return ConfigError(f"{error.filename}: {error.strerror}", hint="Look at the volume and its permissions.")
    return None


async def _find_postgres(plan: RestorePlan, settings: Settings) -> None:
    program = await find_postgres(plan.backup.pg_version // 10000, settings.postgres_bin)
    await require_checks_possible(settings, program.parent)


def _check_hook(directory: Path) -> None:
    hook = directory / "wal-restore.sh"
    if not os.access(hook, os.X_OK):
        raise ConfigError(f"the hook {hook} is absent", hint="Set PITR_HOOK_DIR to the directory it is in.")


def _check_directory(path: Path, settings: Settings, plan: RestorePlan) -> None:
    """Return if `path` is empty, can be made, holds what the same request left, or may be restored over."""
    if (there := _nearest(path)) != path:
        _require_writable(there, f"{path} cannot be made")
        return
    _require_writable(path, f"{path} cannot be restored into")
    marker = read_marker(path)
    if settings.restore_delta and (marker is None or marker.request != restore_request(settings)):
        if marker is not None or holds_data(path):
            require_same_cluster(path, plan.backup.system_identifier)
    elif marker is not None:
        require_same_request(marker, restore_request(settings), path)
    elif found := {entry.name for entry in path.iterdir()} - NOBODYS:
        raise ConfigError(f"{path} is not empty, it holds {min(found)}", hint=EMPTY_HINT)


def _require_writable(directory: Path, message: str) -> None:
    if not is_writable(directory):
        raise ConfigError(
            f"{message}: {directory} cannot be written",
            hint="Run the restore as the user that PostgreSQL runs as, with the volume mounted writable.",
        )


def _check_tablespace(directory: Path, data_directory: Path, settings: Settings) -> None:
    hint = "Mount a volume there, or set PITR_TABLESPACE_MAP=OLD=NEW to restore it into another directory."
    there = _nearest(directory)
    if not is_writable(there):
        raise ConfigError(f"{directory} cannot be used for a tablespace: {there} cannot be written", hint=hint)
    if there == directory and (found := {entry.name for entry in directory.iterdir()} - NOBODYS):
        if settings.restore_delta and is_linked(directory, data_directory):
            return
        claim = directory / CLAIM
        if not (claim.is_file() and claim.read_text() == f"{data_directory}\n"):
            raise ConfigError(f"{directory} is not empty, it holds {min(found)}: no tablespace fits there", hint=hint)


def _is_begun(path: Path) -> bool:
    """Tell whether there is something in the directory already that will not need room again."""
    return path.is_dir() and (read_marker(path) is not None or holds_data(path))


def _check_space(plan: RestorePlan, directories: Iterable[Path]) -> None:
    """Return if the volumes together have room.

    How large each tablespace is no base backup says; so several volumes are counted together.
    """
    needed = round(plan.disk_bytes * _SPARE) + min(_WAL_SEGMENTS, len(plan.segments)) * plan.segment_bytes
    volumes: Mapping[int, _Volume] = {
        there.stat().st_dev: _Volume(there, shutil.disk_usage(there).free) for there in map(_nearest, directories)
    }
    free = sum(volume.free_bytes for volume in volumes.values())
    if free < needed:
        places = " and ".join(str(volume.path) for volume in volumes.values())
        verb = "has" if len(volumes) == 1 else "have together"
        raise ConfigError(
            f"{places} {verb} {free // _MIB} MiB free, but {plan.backup.name} needs {-(-needed // _MIB)} MiB with room "
            "for its WAL",
            hint="Use a larger volume.",
        )


def _nearest(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())
