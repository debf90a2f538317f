"""Reading JSON that somebody else may have written: bounded in size, strict in types, never trusted.

Everything wrong with an object is `RepositoryCorrupt` and names its key.
"""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UINT64 = 1 << 64
_LARGE_BYTES = 256 << 10  # longer than this is parsed in a thread
_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)")


async def read_document(store: ObjectStore, key: str, max_bytes: int) -> "Document | None":
    """Return the JSON object stored as `key`, or None if it is absent.

    Raises:
        RepositoryCorrupt: It is larger than `max_bytes`, or is no JSON object.
        RepositoryError: It could not be read.
    """
    body = bytearray()
    async with store.open(key) as pieces:
        if pieces is None:
            return None
        async for piece in pieces:
            body += piece
            if len(body) > max_bytes:
                raise RepositoryCorrupt(f"{key} is larger than {max_bytes} bytes")
    if len(body) > _LARGE_BYTES:
        return await asyncio.to_thread(parse_document, key, bytes(body))
    return parse_document(key, bytes(body))


def parse_document(key: str, body: bytes) -> "Document":
    """Read the JSON object in `body`, the content of `key`; raise `RepositoryCorrupt` if it is none."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RepositoryCorrupt(
            f"{key} is not JSON: {str(error)[:100]}",
            hint="The object is damaged or not of this repository: restore an intact copy, or move it away.",
        ) from error
    return Document(key, value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class Document:
    """A JSON object and the key it was stored as. A null value counts as absent; unknown names are ignored."""

    def __init__(self, key: str, value: object, path: str = "") -> None:
        self.key = key
        self._path = path
        if not isinstance(value, dict):
            raise self.corrupt(f"{path or 'its content'} is not a JSON object")
        self._values: dict[str, Any] = value

    def corrupt(self, problem: str) -> RepositoryCorrupt:
        """Return the error that says what is wrong with this document."""
        return RepositoryCorrupt(
            f"{self.key}: {problem}",
            hint="The object is damaged or not of this repository: restore an intact copy, or move it away.",
        )

    def names(self) -> list[str]:
        """Return the names it has."""
        return list(self._values)

    def value(self, name: str) -> Any:
        """Return whatever is under `name`, None if there is nothing."""
        return self._values.get(name)

    def _typed(self, name: str, kind: type, words: str) -> Any:
        value = self._values.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.corrupt(f"{self._path}{name} is not {words}")
        return value

    def whole(self, name: str) -> int | None:
        """Return the whole number, 0 to 2**64 - 1, or None."""
        value: int | None = self._typed(name, int, "a whole number")
        if value is not None and not 0 <= value < _UINT64:
            raise self.corrupt(f"{self._path}{name} is not within 0 and 2^64 - 1")
        return value

    def text(self, name: str) -> str | None:
        """Return the string, or None."""
        value: str | None = self._typed(name, str, "a string")
        return value

    def flag(self, name: str) -> bool:
        """Return the boolean, False if there is none."""
        return bool(self._typed(name, bool, "true or false"))

    def moment(self, name: str) -> datetime | None:
        """Return the RFC 3339 time, aware, in UTC, or None."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return parse_moment(text)
        except ValueError:
            raise self.corrupt(f"{self._path}{name} is not an RFC 3339 time with a zone") from None

    def object(self, name: str) -> "Document | None":
        """Return the JSON object, or None."""
        value = self._values.get(name)
        return None if value is None else Document(self.key, value, f"{self._path}{name}.")

    def texts(self, name: str) -> list[str]:
        """Return the list of strings, empty if there is none."""
        values: list[Any] = self._typed(name, list, "a list") or []
        if not all(isinstance(value, str) for value in values):
            raise self.corrupt(f"{self._path}{name} is not a list of strings")
        return values


def parse_nanoseconds(text: str) -> int:
    """Read an RFC 3339 time as nanoseconds since 1970.

    Raises:
        ValueError: It is no such time with a zone, as WAL-G demands.
    """
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an RFC 3339 time with a zone")
    whole, fraction, zone = match.groups()
    since = datetime.fromisoformat(whole + zone) - _EPOCH
    return (since.days * 86400 + since.seconds) * 10**9 + int((fraction or "").ljust(9, "0"))


def parse_moment(text: str) -> datetime:
    """Read an RFC 3339 time, in UTC, to the microsecond; raise `ValueError` as `parse_nanoseconds` does."""
    try:
        return _EPOCH + timedelta(microseconds=parse_nanoseconds(text) // 1000)
    except OverflowError:
        raise ValueError(f"{text!r} is out of range") from None
