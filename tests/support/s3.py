"""Fixtures: one real S3 server for the session, and a prefix of its own for every test."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.lab.seaweedfs import SeaweedServer

BUCKET = "pitr-tests"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedServer]:
    """A running S3 server with the bucket `BUCKET`, shared by all tests of this process: never stop it."""
    directory = Path(tempfile.mkdtemp(prefix="pitr-s3-"))
    with SeaweedServer(directory) as server:
        server.create_bucket(BUCKET)
        yield server
    shutil.rmtree(directory)


@pytest.fixture
def s3_environment(s3_server: SeaweedServer) -> dict[str, str]:
    """The settings that name an empty repository on the session's S3 server."""
    return s3_server.environment(BUCKET, f"test/{uuid.uuid4().hex[:8]}")
