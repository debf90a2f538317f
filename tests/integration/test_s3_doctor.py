"""What is seen of a bucket of S3 beyond its objects: abilities, rules, credentials."""

import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest

from agent.domain.store_checks import BucketFacts, Credentials, LifecycleRule
from agent.errors import RepositoryRefused
from agent.lab.seaweedfs import SeaweedServer
from agent.settings import load_settings
from agent.storage.clock import SystemClock
from agent.storage.s3_bucket import TimeLimits
from agent.storage.s3_doctor import examine_bucket, lifecycle_rule
from tests.support.fault_proxy import Fault, FaultProxy

EXPIRES = {"ID": "old", "Status": "Enabled", "Filter": {"Prefix": "p/"}, "Expiration": {"Days": 30}}


@pytest.fixture
def client(s3_server: SeaweedServer) -> Any:  # boto3 makes its clients' classes at run time
    return boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
    )


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> str:
    """A bucket of the test's own, which may be given rules."""
    name = f"rules-{uuid.uuid4().hex[:8]}"
    s3_server.create_bucket(name)
    return name


async def examine(environment: dict[str, str]) -> BucketFacts:
    settings = load_settings(environment).s3
    assert settings is not None
    return await examine_bucket(settings, SystemClock(), TimeLimits())


async def test_versions_and_lifecycle_rules_are_seen_and_no_probe_is_left(
    s3_server: SeaweedServer, client: Any, bucket: str
) -> None:
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [EXPIRES]})
    before = await examine(s3_server.environment(bucket, "p"))
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    seen = await examine(s3_server.environment(bucket, "p"))
    assert (before.versioning, seen.versioning, seen.prefix, seen.lock) == ("Off", "Enabled", "p/", None)
    assert seen.lifecycle == (LifecycleRule("old", "p/", True, False, False, "after 30 days"),)
    assert (seen.reads_ranges, seen.compares_checksums, seen.is_conditional) == (True, True, True)
    assert client.list_objects_v2(Bucket=bucket).get("KeyCount") == 0


async def test_abilities_that_a_store_lacks_are_found_out(
    s3_server: SeaweedServer, s3_environment: dict[str, str]
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        proxy.add(Fault("PUT", strip_header="If-None-Match", times=1000))
        proxy.add(Fault("GET", path="pitr_probe", status=200, answer_body=b"all of it", times=1000))
        seen = await examine({**s3_environment, "AWS_ENDPOINT": proxy.endpoint})
    assert (seen.reads_ranges, seen.is_conditional) == (False, False)


async def test_one_look_that_is_refused_does_not_keep_the_others_from_being_made(
    s3_server: SeaweedServer, s3_environment: dict[str, str]
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        proxy.add(Fault("GET", path="versioning", status=403, code="AccessDenied", times=1000))
        proxy.add(Fault("GET", path="object-lock", status=501, code="NotImplemented", times=1000))
        seen = await examine({**s3_environment, "AWS_ENDPOINT": proxy.endpoint})
    assert isinstance(seen.versioning, RepositoryRefused)
    assert isinstance(seen.lock, RepositoryRefused)
    assert (seen.lifecycle, seen.reads_ranges) == ((), True)


async def test_it_is_told_where_credentials_are_from_and_whether_they_are_renewed(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (await examine(s3_environment)).credentials == Credentials("AWS_ACCESS_KEY_ID", None, are_renewed=True)
    session = await examine({**s3_environment, "AWS_SESSION_TOKEN": "t"})
    assert session.credentials == Credentials("AWS_ACCESS_KEY_ID", None, are_renewed=False)
    key, secret = s3_environment.pop("AWS_ACCESS_KEY_ID"), s3_environment.pop("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    found = await examine(s3_environment)
    assert found.credentials == Credentials("shared-credentials-file", None, are_renewed=True)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (EXPIRES, LifecycleRule("old", "p/", True, False, False, "after 30 days")),
        ({**EXPIRES, "Status": "Disabled"}, None),
        ({**EXPIRES, "Filter": {"Tag": {"Key": "a", "Value": "b"}}}, None),
        ({**EXPIRES, "Filter": {"And": {"Prefix": "p/", "Tags": [{"Key": "a", "Value": "b"}]}}}, None),
        (
            {**EXPIRES, "Filter": {"And": {"Prefix": "p/", "ObjectSizeGreaterThan": 1}}},
            LifecycleRule("old", "p/", True, False, False, "after 30 days"),
        ),
        (
            {"ID": "cold", "Status": "Enabled", "Prefix": "x", "Transitions": [{"Days": 7, "StorageClass": "GLACIER"}]},
            LifecycleRule("cold", "x", False, True, False, "after 7 days"),
        ),
        (
            {"Status": "Enabled", "Filter": {}, "Transitions": [{"Days": 7, "StorageClass": "STANDARD_IA"}]},
            LifecycleRule("", "", False, False, False, ""),
        ),
        (
            {
                "Status": "Enabled",
                "Filter": {},
                "Expiration": {"ExpiredObjectDeleteMarker": True},
                "NoncurrentVersionExpiration": {"NoncurrentDays": 7},
            },
            LifecycleRule("", "", False, False, True, ""),
        ),
    ],
)
def test_a_lifecycle_rule_is_read_for_what_it_does_to_objects_without_tags(
    rule: dict[str, Any], expected: LifecycleRule | None
) -> None:
    assert lifecycle_rule(rule) == expected
