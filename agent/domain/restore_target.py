"""The moment to restore to: what the user may ask for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from agent.domain.lsn import format_lsn, parse_lsn
from agent.errors import ConfigError

_NAMES = ("TARGET_TIME", "TARGET_LSN", "TARGET_XID", "TARGET_NAME", "TARGET_IMMEDIATE")
TARGET_SETTINGS = (*_NAMES, "TARGET_INCLUSIVE", "TARGET_TIMELINE")
_MAX_NAME_BYTES = 63  # MAXFNAMELEN - 1: pg_create_restore_point() refuses longer names. Source: xlogfuncs.c
_UNNAMEABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates: bytes of the environment that are not UTF-8


class TargetKind(StrEnum):
    """How the target is named; PostgreSQL's recovery_target_* of the same name."""

    END_OF_WAL = "end of WAL"
    TIME = "time"
    LSN = "lsn"
    XID = "xid"
    NAME = "name"
    IMMEDIATE = "immediate"


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """Where recovery is to stop.

    Exactly the field named by `kind` is set. `inclusive` is recovery_target_inclusive. `timeline` is `latest`,
    `current` or a decimal timeline id.
    """

    kind: TargetKind = TargetKind.END_OF_WAL
    time: datetime | None = None
    lsn: int | None = None
    xid: int | None = None
    name: str | None = None
    inclusive: bool = True
    timeline: str = "latest"

    def __str__(self) -> str:
        # Of the others PostgreSQL stops at the target whatever `inclusive` says.
        stops_before = not self.inclusive and self.kind in (TargetKind.TIME, TargetKind.LSN, TargetKind.XID)
        return f"just before {self._place()}" if stops_before else self._place()

    def _place(self) -> str:
        match self.kind:
            case TargetKind.TIME:
                assert self.time is not None
                return f"time {format_time(self.time)}"
            case TargetKind.LSN:
                assert self.lsn is not None
                return f"LSN {format_lsn(self.lsn)}"
            case TargetKind.XID:
                return f"transaction {self.xid}"
            case TargetKind.NAME:
                return f'restore point "{self.name}"'
            case TargetKind.IMMEDIATE:
                return "the end of the base backup"
            case TargetKind.END_OF_WAL:
                return "the end of the archived WAL"


def format_time(moment: datetime) -> str:
    """Write an aware time as RFC 3339 in UTC with microseconds: `2026-11-22T19:53:41.000000Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_time(name: str, text: str) -> datetime:
    """Read an ISO 8601 time that has a zone.

    Raises:
        ConfigError: It is not such a time. One without a zone is refused: PostgreSQL would read it in the server's
            zone, which is seldom the one that the person who wrote it had in mind.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} is not an ISO 8601 time", hint="Write for example 2026-11-22T19:53:41Z."
        ) from None
    if moment.tzinfo is None:
        raise ConfigError(
            f"{name}={text!r} has no time zone",
            hint=f"Add one: {moment.isoformat()}Z for UTC, or {moment.isoformat()}+01:00.",
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ConfigError(
            f"{name}={text!r} is not within the years 1 to 9999 of UTC", hint=f"Correct {name}."
        ) from None


def is_number(text: str) -> bool:
    """Tell whether `text` is a decimal number without sign, in ASCII: `int` reads it, whatever `isdigit` lets pass."""
    return text.isascii() and text.isdigit()


def parse_bool(name: str, text: str) -> bool:
    """Read a boolean as WAL-G (Go's ParseBool) does; raise `ConfigError` naming the setting `name`."""
    lowered = text.strip().lower()
    if lowered in ("1", "t", "true", "yes", "on"):
        return True
    if lowered in ("0", "f", "false", "no", "off"):
        return False
    raise ConfigError(f"{name}={text!r} is neither true nor false", hint="Write true or false.")


def parse_restore_target(values: Mapping[str, str]) -> RestoreTarget:
    """Read the `TARGET_...` settings.

    Raises:
        ConfigError: More than one target is named, or one is malformed.
    """
    given = {name: values.get(name, "").strip() for name in _NAMES}
    given["TARGET_NAME"] = values.get("TARGET_NAME", "")  # a name may begin or end with a blank
    if given["TARGET_IMMEDIATE"] and not parse_bool("TARGET_IMMEDIATE", given["TARGET_IMMEDIATE"]):
        del given["TARGET_IMMEDIATE"]
    given = {name: text for name, text in given.items() if text}
    if len(given) > 1:
        raise ConfigError(f"more than one target is set: {' and '.join(given)}", hint="Keep one of them.")
    inclusive = parse_bool("TARGET_INCLUSIVE", values.get("TARGET_INCLUSIVE", "").strip() or "true")
    timeline = values.get("TARGET_TIMELINE", "").strip() or "latest"
    if timeline not in ("latest", "current") and not (is_number(timeline) and 0 < int(timeline) < 1 << 32):
        raise ConfigError(
            f"TARGET_TIMELINE={timeline!r} is not a timeline", hint="Write latest, current or a decimal number."
        )
    if not given:
        return RestoreTarget(inclusive=inclusive, timeline=timeline)
    ((name, text),) = given.items()
    match name:
        case "TARGET_TIME":
            moment = parse_time(name, text)
            return RestoreTarget(TargetKind.TIME, time=moment, inclusive=inclusive, timeline=timeline)
        case "TARGET_LSN":
            try:
                lsn = parse_lsn(text)
            except ValueError as error:
                raise ConfigError(f"TARGET_LSN: {error}", hint="Write it as PostgreSQL prints it.") from None
            return RestoreTarget(TargetKind.LSN, lsn=lsn, inclusive=inclusive, timeline=timeline)
        case "TARGET_XID":
            if not is_number(text) or int(text) >= 1 << 64:
                raise ConfigError(f"TARGET_XID={text!r} is not a transaction id", hint="Write a decimal number.")
            return RestoreTarget(TargetKind.XID, xid=int(text), inclusive=inclusive, timeline=timeline)
        case "TARGET_NAME":
            if _UNNAMEABLE.search(text) or len(text.encode()) > _MAX_NAME_BYTES:
                raise ConfigError(
                    "TARGET_NAME is not the name of a restore point",
                    hint=f"Names have at most {_MAX_NAME_BYTES} bytes of UTF-8 and no control characters.",
                )
            return RestoreTarget(TargetKind.NAME, name=text, inclusive=inclusive, timeline=timeline)
        case _:
            return RestoreTarget(TargetKind.IMMEDIATE, inclusive=inclusive, timeline=timeline)
