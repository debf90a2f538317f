"""Fixtures: the hook as the package installs it, and a data directory to call it in."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hooks.hatch_build import HOOKS, PROGRAM, SCRIPTS, compile_hook
from tests.hooks.calling import Hook


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the compiled hook and its scripts, laid out as an installation is."""
    directory = tmp_path_factory.mktemp("bin")
    compile_hook(directory / PROGRAM, "test")
    for script in SCRIPTS:
        shutil.copy(HOOKS / script, directory)
    return directory


@pytest.fixture
def hook(installed: Path, tmp_path: Path) -> Iterator[Hook]:
    """The hook, in a data directory of its own; no agent runs yet."""
    (tmp_path / "pg_wal").mkdir()
    with tempfile.TemporaryDirectory(prefix="pitr-hook-") as directory:  # tmp_path is too long for a socket
        yield Hook(installed, tmp_path, Path(directory, "agent.sock"))
