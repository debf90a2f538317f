"""The marker: what a restore was asked for and how far it has come, kept in the directory it fills.

`pitr.restore.json` is the first file in the directory and stays after promotion. It answers what a restarted Job must
know: is this directory mine, and where do I go on? The stages, each written durably after what it states is durable:

    (none, directory empty) -> hydrating -> hydrated -> replaying -> promoted
                                                                  -> failed

- hydrating: the files of the base backup are being written; `global/pg_control` is not there yet, so that PostgreSQL
  cannot start. The same request goes on with the same backup, see `agent.restore.parts_done`.
- hydrated: the base backup, the recovery settings and pg_control are in place; any server may replay from here.
- replaying: a server of ours replays, or did when it was killed; no other can be started. It goes on where it stopped,
  because PostgreSQL itself remembers how far it has replayed: nothing is downloaded twice.
- promoted: recovery reached its target and the server was stopped cleanly. The same request has nothing to do.
- failed: the server opened with less than the plan promised, or its promotion was cut short. Nothing goes on from
  there, and no server can be started: `global/pg_control` has been set aside.

Another request than the marker's is refused in every stage: a restore never writes over another's result, unless it is
told to (`PITR_RESTORE_DELTA`) and both are of the same database cluster.
The functions block for file I/O: call them in a thread.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from agent.domain.restore_target import format_time, parse_time
from agent.errors import ConfigError
from agent.postgres.durable import replace_durably
from agent.postgres.server_checks import Check
from agent.settings import RestoreAs, Settings

MARKER_NAME = "pitr.restore.json"
NOBODYS = frozenset({"lost+found", f"{MARKER_NAME}.pitr-new"})
"""Names in a directory that is empty nevertheless."""
DRILL = "drill"
"""Key of a request that is a drill: its result is nobody's."""


class MarkerStage(StrEnum):
    """How far a restore has come."""

    HYDRATING = "hydrating"
    HYDRATED = "hydrated"
    REPLAYING = "replaying"
    PROMOTED = "promoted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RestoreMarker:
    """The content of the marker.

    request: what was asked for, see `restore_request`.
    stage: how far it has come.
    backup: name of the base backup that the plan chose.
    timeline: the timeline that the plan follows: recovery_target_timeline.
    target: where recovery stops, in words.
    note: what the plan has to say about that, or empty.
    first_segment, last_segment: names of the first and the last WAL segment that replay reads.
    stop_commit_at: see `RestorePlan`.
    to_the_end: no target is set: replay must reach the last segment, and nothing else would tell if it did not.
    started_at: when the restore began.
    finished_at, new_timeline, last_commit_at: when the promoted server was stopped, the timeline it began, and the
        time of the last transaction it replayed (None if there was none). None before the stage promoted.
    failure: why the stage is failed.
    backup_bytes: how much the base backups write.
    wal_bytes: how much WAL was replayed.
    checks: what the promoted server was checked for, None before that.
    prepared_transactions: how many came back in doubt; None before the stage promoted.
    system_identifier: the database cluster whose files are in the directory; None if the base backup does not name it.
    """

    request: Mapping[str, str]
    stage: MarkerStage
    backup: str
    timeline: int
    target: str
    first_segment: str
    last_segment: str
    to_the_end: bool
    started_at: datetime
    stop_commit_at: datetime | None = None
    finished_at: datetime | None = None
    new_timeline: int | None = None
    last_commit_at: datetime | None = None
    failure: str | None = None
    note: str = ""
    backup_bytes: int | None = None
    wal_bytes: int | None = None
    checks: tuple[Check, ...] | None = None
    prepared_transactions: int | None = None
    system_identifier: int | None = None


def restore_request(settings: Settings) -> dict[str, str]:
    """Return what a restore with these settings asks for: two restores with equal requests may share a directory.

    AUTO_START is not part of it: a directory that was only hydrated may be run through replay later.
    """
    special = {"restore_as": settings.restore_as.value} if settings.restore_as is not RestoreAs.PRIMARY else {}
    if settings.is_drill:
        special[DRILL] = "true"
    return {
        "repository": settings.repository,
        "backup_name": settings.backup_name,
        "target": str(settings.target),
        "target_inclusive": str(settings.target.inclusive).lower(),
        "target_timeline": settings.target.timeline,
        "tablespace_map": json.dumps(dict(settings.tablespace_map), sort_keys=True) if settings.tablespace_map else "",
        "archive_after_restore": str(settings.archive_after_restore).lower(),
        **special,
    }


def read_marker(data_directory: Path) -> RestoreMarker | None:
    """Return the marker of `data_directory`, or None if it has none.

    Raises:
        ConfigError: There is one that cannot be read or understood.
    """
    path = data_directory / MARKER_NAME
    try:
        return _from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}",
            hint="Run the restore as the user that owns the data directory.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a marker of a restore: {error}",
            hint="Restore into an empty directory; keep this one until you know what it holds.",
        ) from error


def write_marker(data_directory: Path, marker: RestoreMarker) -> None:
    """Replace the marker of `data_directory`; durable on return. Raises `OSError`."""
    values = dataclasses.asdict(marker)
    for name, value in values.items():
        if isinstance(value, datetime):
            values[name] = format_time(value)
    replace_durably(data_directory / MARKER_NAME, json.dumps(values, indent=2).encode() + b"\n")


def mark(data_directory: Path, marker: RestoreMarker, stage: MarkerStage) -> RestoreMarker:
    """Put `marker` with `stage` in place, and return it; durable on return. Raises `OSError`."""
    marker = dataclasses.replace(marker, stage=stage)
    write_marker(data_directory, marker)
    return marker


def require_same_request(marker: RestoreMarker, request: Mapping[str, str], data_directory: Path) -> None:
    """Return if `marker` was left by `request`, else raise `ConfigError` naming the first difference."""
    for name in sorted({*marker.request, *request}):
        then, now = marker.request.get(name), request.get(name)
        if then != now:
            raise ConfigError(
                f"{data_directory} holds another restore ({marker.stage}): its {name} was {then!r}, now it is {now!r}",
                hint="Restore into an empty directory, or repeat the request that this one was begun with.",
            )


def _from_json(values: object) -> RestoreMarker:
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - what is wrong is the file, not a caller's type

    def moment(name: str) -> datetime | None:
        text = values.get(name)
        return None if text is None else parse_time(name, str(text))

    started_at, request = moment("started_at"), values["request"]

    def number(name: str) -> int | None:
        value = values.get(name)
        return None if value is None else int(str(value))

    failure = values.get("failure")
    checks = values.get("checks")
    if started_at is None or not isinstance(request, dict):
        raise ValueError("it lacks its request or its start")
    return RestoreMarker(
        request={str(name): str(value) for name, value in request.items()},
        stage=MarkerStage(str(values["stage"])),
        backup=str(values["backup"]),
        timeline=int(str(values["timeline"])),
        target=str(values["target"]),
        first_segment=str(values["first_segment"]),
        last_segment=str(values["last_segment"]),
        to_the_end=values["to_the_end"] is True,
        started_at=started_at,
        stop_commit_at=moment("stop_commit_at"),
        finished_at=moment("finished_at"),
        new_timeline=number("new_timeline"),
        last_commit_at=moment("last_commit_at"),
        failure=None if failure is None else str(failure),
        note=str(values.get("note", "")),
        backup_bytes=number("backup_bytes"),
        wal_bytes=number("wal_bytes"),
        prepared_transactions=number("prepared_transactions"),
        system_identifier=number("system_identifier"),
        checks=None if checks is None else tuple(Check(**check) for check in checks),
    )
