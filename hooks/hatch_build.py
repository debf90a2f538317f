"""Compiles the hook when the package is built, and installs it and its two scripts beside `pitr`.

The compiler is `$CC` or `cc`; where there is none, or none that can link statically, `zig cc` of the package `ziglang`,
which is then asked for as a build requirement.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HOOKS = Path(__file__).resolve().parent
PROGRAM = "pitr-hook"
SCRIPTS = ("wal-archive.sh", "wal-restore.sh")
ZIG = "ziglang>=0.13,<1"

_FLAGS = (
    *("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O2", "-s"),
    *("-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wshadow", "-Wformat=2", "-Wundef", "-Wcast-qual"),
    *("-Wstrict-prototypes", "-Wmissing-prototypes"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"),
)


class CompileError(Exception):
    """The hook could not be compiled; the message says how to get a compiler that can."""


def _cc() -> Iterator[list[str]]:
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    yield [*command, "-static-pie", "-fPIE"]
    yield [*command, "-static"]


def _zig_cc() -> Iterator[list[str]]:
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-musl", "-static"]


def compile_command(compiler: list[str], target: Path, version: str) -> list[str]:
    """Return the command by which `compiler`, with what makes it link statically, makes the hook `target`."""
    sources = [str(source) for source in sorted(HOOKS.glob("*.c"))]
    return [*compiler, *_FLAGS, f'-DPITR_VERSION="{version}"', *sources, "-o", str(target)]


def _problem(command: list[str], target: Path, version: str) -> str | None:
    """Compile with `command`; return why there is no working hook at `target`, or None if there is."""
    try:
        for step in (compile_command(command, target, version), [str(target), "--version"]):
            subprocess.run(step, check=True, capture_output=True, text=True)
    except OSError as error:
        return f"{shlex.join(command)}: {error.strerror}"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)}: {error.stderr.strip() or error}"
    return None


def compile_hook(target: Path, version: str) -> Path:
    """Compile the hook, static, to the file `target`; return `target`.

    Raises:
        CompileError: No compiler here can.
    """
    problems = []
    for command in (*_cc(), *_zig_cc()):
        problem = _problem(command, target, version)
        if problem is None:
            return target
        problems.append(problem)
    raise CompileError(
        "pitr-hook cannot be compiled. Install a C compiler with a static C library (Debian: gcc libc6-dev, Alpine: "
        "gcc musl-dev) or the Python package ziglang. Tried: " + "; ".join(problems)
    )


class HookBuilder(BuildHookInterface[Any]):
    """Adds the compiled hook and its scripts to a wheel, or to an editable installation."""

    def dependencies(self) -> list[str]:
        """Ask for `ziglang` where the system's own compiler will not do."""
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory, PROGRAM)
            works = any(_problem(command, target, self.metadata.version) is None for command in _cc())
        return [] if works else [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface's signature
        """Compile, and name the files to install. The wheel is for any Python 3 on this kind of machine."""
        self._directory = tempfile.TemporaryDirectory()
        program = Path(self._directory.name, PROGRAM)
        try:
            compile_hook(program, self.metadata.version)
        except CompileError as error:
            self.app.abort(str(error))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["shared_scripts"][str(program)] = PROGRAM
        build_data["shared_scripts"].update({str(HOOKS / script): script for script in SCRIPTS})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - likewise
        """Remove what was compiled: the wheel has it now."""
        self._directory.cleanup()
