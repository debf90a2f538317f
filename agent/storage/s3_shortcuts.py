"""What botocore does anew for every request, and need not: a third of a request's CPU time, most of a listing's."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any

from aiobotocore.session import AioSession
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

USER_AGENT = f"postgres-pitr/{version('postgres-pitr')}"
"""How requests introduce themselves. botocore's own, of twelve parts, is put together for each request."""

_OF_AN_OBJECT = ("Key", "Prefix", "CopySource")


def parse_time(text: str) -> datetime:
    """Parse a time as S3 writes it, in a header (HTTP's form) or a listing (ISO 8601); any other as botocore does.

    botocore guesses the form: 0.1 ms for each object of a listing. A time without a zone is UTC.

    Raises:
        ResponseParserError: It is no time.
    """
    try:
        parsed: datetime = datetime.fromisoformat(text) if text[:1].isdigit() else parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        try:
            parsed = parse_timestamp(text)
        except (ValueError, OverflowError, RuntimeError) as error:
            raise ResponseParserError(f'"{text}" is no time') from error
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


def parse_times_fast(session: AioSession) -> None:
    """Let the clients of `session` parse times by `parse_time`."""
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)


def find_endpoint_once(client: Any) -> None:
    """Let `client` find out once where the requests about a bucket go, instead of once for each object.

    botocore remembers the answer of its rules by all that they are given. That includes the object, which none of them
    looks at. Where a later release keeps its rules elsewhere, this does nothing.
    """
    rules = getattr(getattr(client, "_ruleset_resolver", None), "_provider", None)
    if rules is not None:
        for name in _OF_AN_OBJECT:
            rules.ruleset.parameters.pop(name, None)
