"""Fixture: the hook as the package installs it, called in a data directory of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hooks.calling import Hook


@pytest.fixture
def hook(hook_directory: Path, tmp_path: Path) -> Iterator[Hook]:
    """The hook; no agent runs yet."""
    (tmp_path / "pg_wal").mkdir()
    with tempfile.TemporaryDirectory(prefix="pitr-hook-") as directory:  # tmp_path is too long for a socket
        yield Hook(hook_directory, tmp_path, Path(directory, "agent.sock"))
