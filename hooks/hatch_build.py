"""Compiles what is written in C when the package is built: the hook, and the library for `agent/domain/page.py`.

The hook and its two scripts are installed beside `pitr`, the library among the Python packages. The compiler is `$CC`
or `cc`; where there is none, or none that can link statically, `zig cc` of the package `ziglang`, which is then asked
for as a build requirement.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HOOKS = Path(__file__).resolve().parent
PROGRAM = "pitr-hook"
SCRIPTS = ("wal-archive.sh", "wal-restore.sh")
LIBRARY = "pitr_page.so"
LIBRARY_SOURCE = HOOKS.parent / "agent" / "domain" / "page.c"
ZIG = "ziglang>=0.13,<1"

_WARNINGS = (
    *("-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wshadow", "-Wformat=2", "-Wundef", "-Wcast-qual"),
    *("-Wstrict-prototypes", "-Wmissing-prototypes"),
)
_PROGRAM_FLAGS = (
    *("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O2", "-s", *_WARNINGS),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"),
)
# It needs no C library, so that it is the same for each: Python's may be another than the compiler's.
_LIBRARY_FLAGS = (
    *("-std=c11", "-O3", "-s", *_WARNINGS),
    *("-shared", "-fPIC", "-ffreestanding", "-nostdlib", "-fno-stack-protector"),
)

_Steps = Callable[[list[str]], list[list[str]]]
"""Says of a compiler what is to be run with it."""


class CompileError(Exception):
    """Something could not be compiled; the message says how to get a compiler that can."""


def _cc() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _static_cc() -> list[list[str]]:
    return [[*_cc(), "-static-pie", "-fPIE"], [*_cc(), "-static"]]


def _zig_cc(*options: str) -> list[list[str]]:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-musl", *options]
    return [command] if importlib.util.find_spec("ziglang") else []


def program_command(compiler: list[str], target: Path, version: str) -> list[str]:
    """Return the command by which `compiler`, with what makes it link statically, makes the hook `target`."""
    sources = [str(source) for source in sorted(HOOKS.glob("*.c"))]
    return [*compiler, *_PROGRAM_FLAGS, f'-DPITR_VERSION="{version}"', *sources, "-o", str(target)]


def library_command(compiler: list[str], target: Path) -> list[str]:
    """Return the command by which `compiler` makes the library `target`."""
    return [*compiler, *_LIBRARY_FLAGS, str(LIBRARY_SOURCE), "-o", str(target)]


def _program_steps(target: Path, version: str) -> _Steps:
    return lambda compiler: [program_command(compiler, target, version), [str(target), "--version"]]


def _problem(compiler: list[str], steps: _Steps) -> str | None:
    """Run the `steps` with `compiler`; return why one of them fails, or None if none does."""
    try:
        for step in steps(compiler):
            subprocess.run(step, check=True, capture_output=True, text=True)
    except OSError as error:
        return f"{shlex.join(compiler)}: {error.strerror}"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(compiler)}: {error.stderr.strip() or error}"
    return None


def _compile(name: str, compilers: list[list[str]], steps: _Steps) -> None:
    problems = []
    for compiler in compilers:
        problem = _problem(compiler, steps)
        if problem is None:
            return
        problems.append(problem)
    raise CompileError(
        f"{name} cannot be compiled. Install a C compiler with a static C library (Debian: gcc libc6-dev, Alpine: "
        "gcc musl-dev) or the Python package ziglang. Tried: " + "; ".join(problems)
    )


def compile_hook(target: Path, version: str) -> Path:
    """Compile the hook, static, to the file `target`; return `target`.

    Raises:
        CompileError: No compiler here can.
    """
    _compile(PROGRAM, [*_static_cc(), *_zig_cc("-static")], _program_steps(target, version))
    return target


def compile_library(target: Path) -> Path:
    """Compile the library, for this Python to load, to the file `target`; return `target`.

    Raises:
        CompileError: No compiler here can.
    """
    load = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(target)]
    _compile(LIBRARY, [_cc(), *_zig_cc()], lambda compiler: [library_command(compiler, target), load])
    return target


class HookBuilder(BuildHookInterface[Any]):
    """Adds the compiled hook, its scripts and the library to a wheel, or to an editable installation."""

    def dependencies(self) -> list[str]:
        """Ask for `ziglang` where the system's own compiler will not do."""
        with tempfile.TemporaryDirectory() as directory:
            steps = _program_steps(Path(directory, PROGRAM), self.metadata.version)
            works = any(_problem(compiler, steps) is None for compiler in _static_cc())
        return [] if works else [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface's signature
        """Compile, and name the files to install. The wheel is for any Python 3 on this kind of machine."""
        self._directory = tempfile.TemporaryDirectory()
        try:
            program = compile_hook(Path(self._directory.name, PROGRAM), self.metadata.version)
            library = compile_library(Path(self._directory.name, LIBRARY))
        except CompileError as error:
            self.app.abort(str(error))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["shared_scripts"][str(program)] = PROGRAM
        build_data["shared_scripts"].update({str(HOOKS / script): script for script in SCRIPTS})
        build_data["force_include"][str(library)] = LIBRARY

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - likewise
        """Remove what was compiled: the wheel has it now."""
        self._directory.cleanup()
