"""What the package makes of the hook: a static program, its scripts, and constants that the agent shares."""

import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agent.server import hook_api
from hooks.hatch_build import HOOKS, PROGRAM, CompileError, compile_hook
from tests.hooks.calling import Hook

PT_INTERP = 3  # Source: elf(5)


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


def test_the_hook_is_static(hook: Hook) -> None:
    program = Path(hook.program).read_bytes()
    table, size, count = *struct.unpack_from("<Q", program, 32), *struct.unpack_from("<HH", program, 54)
    types = [struct.unpack_from("<I", program, table + number * size)[0] for number in range(count)]
    assert PT_INTERP not in types


def test_a_wheel_installs_the_hook_and_its_scripts_beside_pitr(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=HOOKS.parent, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert re.fullmatch(r"postgres_pitr-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        scripts = {Path(name).name for name in archive.namelist() if ".data/scripts/" in name}
    assert scripts == {PROGRAM, "wal-archive.sh", "wal-restore.sh"}


def test_without_a_compiler_that_can_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc -m64")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(
        CompileError, match=r"gcc libc6-dev.*ziglang.*/nonexistent/cc -m64 -static-pie -fPIE: No such file or directory"
    ):
        compile_hook(tmp_path / PROGRAM, "test")
