"""What the package makes of what is written in C: the hook, a static program, its scripts, and constants that the agent
shares; the library for pages, which runs with any C library."""

import importlib.util
import platform
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agent.server import hook_api
from hooks.hatch_build import (
    HOOKS,
    LIBRARY,
    PROGRAM,
    SCRIPTS,
    CompileError,
    compile_hook,
    compile_library,
    library_command,
)
from tests.hooks.calling import Hook

PT_DYNAMIC, PT_INTERP, DT_NEEDED = 2, 3, 1  # Source: elf(5)


def defined(header: str) -> dict[str, str | int]:
    """Read the numbers and strings that a header of the hook defines."""
    pairs = re.findall(r'^#define (\w+) +(?:"(.*?)"|(\d+))', (HOOKS / header).read_text(), re.MULTILINE)
    return {name: int(number) if number else text for name, text, number in pairs}


def test_hook_and_agent_agree_on_the_protocol() -> None:
    shared = {name: value for name, value in defined("protocol.h").items() if name != "DEFAULT_SOCKET"}
    assert shared == {
        "HOOK_PATH_PREFIX": hook_api.HOOK_PATH_PREFIX,
        "HEADER_WAL_FILE": hook_api.HEADER_WAL_FILE,
        "HEADER_DEADLINE": hook_api.HEADER_DEADLINE,
        "HEADER_PLACE": hook_api.HEADER_PLACE,
        "HEADER_FILE": hook_api.HEADER_FILE,
        "STATUS_OK": hook_api.STATUS_OK,
        "STATUS_PLACED": hook_api.STATUS_PLACED,
        "STATUS_ABSENT": hook_api.STATUS_ABSENT,
        "STATUS_RETRY": hook_api.STATUS_RETRY,
        "STATUS_WRONG_REQUEST": hook_api.STATUS_WRONG_REQUEST,
        "STATUS_DAMAGED": hook_api.STATUS_DAMAGED,
    }


def test_the_exit_codes_are_those_that_postgresql_understands() -> None:
    assert defined("exit_codes.h") == {
        "EXIT_ARCHIVED": 0,
        "EXIT_NOT_ARCHIVED": 1,
        "EXIT_RESTORED": 0,
        "EXIT_ABSENT": 1,
        "EXIT_ABORT_RECOVERY": 255,
        "EXIT_STANDBY_RETRY": 1,
    }


def segments(program: bytes) -> dict[int, bytes]:
    """Read the segments of an ELF file of 64 bits: type to content."""
    table, size, count = *struct.unpack_from("<Q", program, 32), *struct.unpack_from("<HH", program, 54)
    headers = [struct.unpack_from("<IIQQQQ", program, table + number * size) for number in range(count)]
    return {kind: program[offset : offset + length] for kind, _, offset, _, _, length in headers}


def test_the_hook_is_static(hook: Hook) -> None:
    assert PT_INTERP not in segments(Path(hook.program).read_bytes())


def compilers() -> list[list[str]]:
    """Return those that are here: the system's, and zig for this machine and for arm64."""
    machines = (platform.machine(), "aarch64") if importlib.util.find_spec("ziglang") else ()
    zig = [[sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-musl"] for machine in machines]
    return [["cc"], *zig] if shutil.which("cc") else zig


@pytest.mark.parametrize("compiler", compilers(), ids=" ".join)
def test_the_library_needs_no_other(compiler: list[str], tmp_path: Path) -> None:
    subprocess.run(library_command(compiler, tmp_path / LIBRARY), check=True)
    dynamic = segments((tmp_path / LIBRARY).read_bytes())[PT_DYNAMIC]
    assert DT_NEEDED not in [tag for tag, _ in struct.iter_unpack("<QQ", dynamic)]


def test_a_wheel_installs_hook_and_scripts_beside_pitr_and_the_library_among_the_packages(
    tmp_path: Path,
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=HOOKS.parent, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert re.fullmatch(r"postgres_pitr-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {Path(name).name for name in names if ".data/scripts/" in name} == {PROGRAM, *SCRIPTS}
    assert LIBRARY in names
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_without_a_compiler_that_can_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc -m64")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(
        CompileError, match=r"gcc libc6-dev.*ziglang.*/nonexistent/cc -m64 -static-pie -fPIE: No such file or directory"
    ):
        compile_hook(tmp_path / PROGRAM, "test")
    with pytest.raises(CompileError, match=f"{LIBRARY} cannot be compiled"):
        compile_library(tmp_path / LIBRARY)


def test_a_library_that_this_python_cannot_load_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc -m32")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(CompileError, match=f"{LIBRARY} cannot be compiled"):
        compile_library(tmp_path / LIBRARY)
