"""What is not asked of botocore for each request: the outcome must be the same."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis.strategies import datetimes, just

from agent.errors import RepositoryUnavailable
from agent.settings import load_settings
from agent.storage.s3_bucket import S3Bucket, TimeLimits
from agent.storage.s3_reading import answered_at
from agent.storage.s3_shortcuts import parse_time

WHEN = datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=just(UTC))  # noqa: DTZ001 - it wants naive bounds


@pytest.fixture
async def bucket(unused_tcp_port: int) -> AsyncIterator[S3Bucket]:
    """A bucket at an address where nobody listens."""
    settings = load_settings({
        "WALG_S3_PREFIX": "s3://bucket/prefix", "AWS_ENDPOINT": f"http://127.0.0.1:{unused_tcp_port}",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "region",
    })  # fmt: skip
    assert settings.s3 is not None
    opened = await S3Bucket.connect(settings.s3, TimeLimits())
    yield opened
    await opened.close()


@given(WHEN)
def test_times_of_headers_and_listings_are_read_as_botocore_reads_them(when: datetime) -> None:
    for text in (
        format_datetime(when, usegmt=True),
        f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03}Z",
        f"{when:%Y-%m-%dT%H:%M:%S}Z",
    ):
        assert parse_time(text) == parse_timestamp(text)


@pytest.mark.parametrize("text", ["1764531720", "Mon Nov 30 19:42:00 2026", "30 November 2026 19:42:00 UTC"])
def test_a_time_in_another_form_is_left_to_botocore(text: str) -> None:
    parsed = parse_timestamp(text)
    assert parse_time(text) == (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC))


@given(WHEN)
def test_a_time_without_a_zone_is_utc(when: datetime) -> None:
    assert parse_time(f"{when:%Y-%m-%dT%H:%M:%S}") == when.replace(microsecond=0)
    assert parse_time(f"{when:%a, %d %b %Y %H:%M:%S} -0000") == when.replace(microsecond=0)


@pytest.mark.parametrize("text", ["yesterday", "", "9" * 400, f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"])
def test_what_is_no_time_is_an_answer_that_is_not_understood(text: str) -> None:
    with pytest.raises(ResponseParserError, match=f'^"{text}" is no time$'):
        parse_time(text)


def test_the_store_answered_now_if_it_says_nothing_that_can_be_understood() -> None:
    for headers in ({}, {"date": ""}, {"date": "noon"}):
        before = datetime.now(UTC)
        assert before <= answered_at({"ResponseMetadata": {"HTTPHeaders": headers}}) <= datetime.now(UTC)


@pytest.mark.parametrize("operation", ["GetObject", "HeadObject", "PutObject", "ListObjectsV2"])
async def test_the_endpoint_of_a_request_is_found_without_its_object(bucket: S3Bucket, operation: str) -> None:
    model = bucket.client.meta.service_model.operation_model(operation)
    resolver: Any = bucket.client._ruleset_resolver
    named = ({"Bucket": "bucket", "Key": name, "Prefix": name} for name in ("one", "another"))
    one, another = [await resolver._get_provider_params(model, arguments, {}) for arguments in named]
    assert one == another
    assert one["Bucket"] == "bucket"


async def test_requests_carry_our_name(bucket: S3Bucket) -> None:
    sent: list[str] = []
    bucket.client.meta.events.register(
        "before-send.s3", lambda request, **_: sent.append(request.headers["User-Agent"].decode())
    )
    with pytest.raises(RepositoryUnavailable):
        async with bucket.request("read", "key"):
            await bucket.client.get_object(**bucket.object("key"))
    assert sent[0].startswith("postgres-pitr/")
