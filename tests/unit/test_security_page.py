"""What SECURITY.md says: policies that allow what the agent asks of S3 and no more, and what the socket does not do."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from agent.repository.drill_record import DRILLED
from agent.repository.keys import sentinel_key
from agent.repository.restore_record import RESTORED
from agent.server.control_api import ControlApi
from agent.server.hook_api import HookApi

ROOT = Path(__file__).parents[2]
PERMISSIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_object_versions": "s3:ListBucketVersions",
    "get_bucket_versioning": "s3:GetBucketVersioning",
    "get_object_lock_configuration": "s3:GetBucketObjectLockConfiguration",
    "get_bucket_lifecycle_configuration": "s3:GetLifecycleConfiguration",
}
"""What a request of the client needs. Source: AWS's Service Authorization Reference, Amazon S3."""


def policies() -> list[Any]:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    return [json.loads(block) for block in blocks]


def actions(policy: Any) -> set[str]:
    stated = [statement["Action"] for statement in policy["Statement"]]
    return {action for each in stated for action in ([each] if isinstance(each, str) else each)}


def asked_in(*modules: Path) -> set[str]:
    source = "".join(module.read_text() for module in modules)
    versions = {"s3:GetObjectVersion"} if "VersionId=" in source else set()
    return versions | {PERMISSIONS[name] for name in re.findall(r"\bclient\.([a-z_0-9]+)\(", source)}


def test_the_policies_allow_just_what_the_agent_asks_for() -> None:
    archive, restore, check = policies()
    doctor = ROOT / "agent" / "storage" / "s3_doctor.py"
    others = [path for path in (ROOT / "agent" / "storage").glob("*.py") if path != doctor]
    assert actions(archive) == asked_in(*others)
    assert actions(check) == asked_in(doctor) - actions(archive)
    assert actions(restore) < actions(archive)


@pytest.mark.parametrize("key", [RESTORED.key("base"), DRILLED.key("base")])
def test_the_policy_of_a_restore_lets_it_note_what_it_measured_and_how_a_drill_ended(key: str) -> None:
    resources = [
        resource
        for statement in policies()[1]["Statement"]
        if "s3:PutObject" in actions({"Statement": [statement]})
        for resource in ([statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"])
    ]
    assert any(fnmatchcase(f"arn:aws:s3:::BUCKET/PATH/{key}", resource) for resource in resources)
    assert not any(fnmatchcase(f"arn:aws:s3:::BUCKET/PATH/{sentinel_key('base')}", each) for each in resources)


def test_the_sql_for_the_role_is_what_pitr_check_would_print() -> None:
    from agent.domain.server_checks import functions_needed

    page = (ROOT / "SECURITY.md").read_text()
    granted = set(re.findall(r"GRANT EXECUTE ON FUNCTION (.*) TO pitr;", page))
    assert granted == {*functions_needed(14), *functions_needed(15)}


def test_on_the_socket_nothing_can_be_asked_that_deletes_expires_or_restores() -> None:
    nothing: Any = None
    hooks, control = HookApi(nothing, nothing, nothing, 1.0), ControlApi(nothing, nothing)
    assert {(route.method, route.path) for route in (*hooks.routes(), *control.routes())} == {
        ("POST", "/v1/wal/{name}"),
        ("GET", "/v1/wal/{name}"),
        ("POST", "/v1/backups"),
        ("POST", "/v1/backups/cancel"),
        ("GET", "/v1/status"),
    }
