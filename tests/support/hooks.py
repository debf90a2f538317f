"""Fixture: the hooks, laid out as `pip install` does, where PostgreSQL can run them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.lab.privileges import hand_over, make_temporary_directory
from hooks.hatch_build import HOOKS, PROGRAM, SCRIPTS, compile_hook


@pytest.fixture(scope="session")
def hook_directory() -> Iterator[Path]:
    """The directory of `pitr-hook`, freshly compiled, and its two scripts; readable to whom PostgreSQL runs as."""
    directory = make_temporary_directory("pitr-hooks-")
    compile_hook(directory / PROGRAM, "test")
    for script in SCRIPTS:
        shutil.copy(HOOKS / script, directory)
    hand_over(directory)
    yield directory
    shutil.rmtree(directory)
