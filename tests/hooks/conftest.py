"""Fixture: the hook as the package installs it, called in a data directory of its own; on request, that for arm64."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hooks.hatch_build import HOOKS, PROGRAM, SCRIPTS, program_command
from tests.hooks.calling import Hook

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CROSS_COMPILER = "aarch64-linux-gnu-gcc"


@pytest.fixture(scope="session")
def arm64_hook_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the hooks for arm64, whose `pitr-hook` runs by emulation."""
    if shutil.which(CROSS_COMPILER):
        compiler = [CROSS_COMPILER, "-static-pie", "-fPIE"]
    elif importlib.util.find_spec("ziglang"):
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    else:
        pytest.skip(f"no compiler for arm64: {CROSS_COMPILER} (Debian: gcc-aarch64-linux-gnu) or the package ziglang")
    if EMULATOR is None:
        pytest.skip("no emulator of arm64 (Debian: qemu-user-static)")
    directory = tmp_path_factory.mktemp("arm64")
    program = directory / "pitr-hook-arm64"
    subprocess.run(program_command(compiler, program, "test"), check=True)
    (directory / PROGRAM).write_text(f'#!/bin/sh\nexec {EMULATOR} {shlex.quote(str(program))} "$@"\n')
    (directory / PROGRAM).chmod(0o755)
    for script in SCRIPTS:
        shutil.copy(HOOKS / script, directory)
    return directory


@pytest.fixture
def hook(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hook]:
    """The hook; no agent runs yet. Indirectly parametrized with "arm64", it is that one."""
    is_arm64 = getattr(request, "param", "") == "arm64"
    hooks = request.getfixturevalue("arm64_hook_directory" if is_arm64 else "hook_directory")
    (tmp_path / "pg_wal").mkdir()
    with tempfile.TemporaryDirectory(prefix="pitr-hook-") as directory:  # tmp_path is too long for a socket
        yield Hook(hooks, tmp_path, Path(directory, "agent.sock"))
