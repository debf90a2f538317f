"""How PostgreSQL calls the hook: names, paths, options, the destination, and the two scripts."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from agent.domain.wal import wal_file_kind
from tests.hooks.calling import Hook, finish
from tests.hooks.scripted_agent import ScriptedAgent, reply

SEGMENT = "00000001FFFFFFFF000000FF"
CONTENT = b"one WAL file"
NAMES = [SEGMENT, f"{SEGMENT}.partial", f"{SEGMENT}.00000028.backup", "0000000A.history"]
BAD_NAMES = [
    "",
    "RECOVERYXLOG",
    SEGMENT.lower(),
    SEGMENT[:-1],
    SEGMENT + "0",
    SEGMENT + "\n",
    SEGMENT + " ",
    SEGMENT + ".lz4",
    SEGMENT + ".partial.partial",
    SEGMENT + ".0000028.backup",
    SEGMENT + ".00000028.backups",
    "../" + SEGMENT,
    "00000001.History",
    "00000001history",
    "G0000001.history",
    f"{SEGMENT}?x=y HTTP/1.1\r\nHost: other",
]
USAGES = [
    [],
    [SEGMENT],
    [SEGMENT, SEGMENT, SEGMENT],
    [SEGMENT, SEGMENT, "--timeout"],
    [SEGMENT, SEGMENT, "--socket", ""],
    [SEGMENT, SEGMENT, "--verbose"],
    [SEGMENT, SEGMENT, "--help"],
    [SEGMENT, SEGMENT, "-t", "3"],
    ["--help"],
    ["--version"],
    *([SEGMENT, SEGMENT, "--timeout", bad] for bad in ["", "0", "-1", "1.5", "1e3", "5s", " 5", "86401", "9" * 30]),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_four_kinds_of_wal_file_are_archived_and_restored(hook: Hook, name: str) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=name)):
        assert (hook.archive(name).returncode, hook.restore(name).returncode) == (0, 0)
    assert hook.destination.read_bytes() == CONTENT


@pytest.mark.parametrize("name", BAD_NAMES)
def test_any_other_name_is_refused_without_asking_the_agent(hook: Hook, name: str) -> None:
    assert wal_file_kind(name) is None
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=name.strip())) as agent:
        assert (hook.archive(name).returncode, hook.restore(name).returncode) == (1, 255)
    assert agent.requests == []


@pytest.mark.parametrize("path", ["pg_wal/RECOVERYXLOG", "", SEGMENT + "/", f"pg_wal/x{SEGMENT}", f"{SEGMENT}/other"])
def test_a_path_that_is_not_of_this_wal_file_is_not_archived(hook: Hook, path: str) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, wal_file=SEGMENT)) as agent:
        done = hook.run("archive", path, SEGMENT)
    assert (done.returncode, agent.requests) == (1, [])
    assert "not the path of that WAL file" in done.stderr


def test_a_file_that_is_not_there_is_not_archived_whatever_the_agent_has(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, wal_file=SEGMENT)) as agent:
        done = hook.run("archive", f"pg_wal/{SEGMENT}", SEGMENT)
    assert (done.returncode, agent.requests) == (1, [])
    assert f'cannot look at "pg_wal/{SEGMENT}": No such file or directory. ' in done.stderr


@pytest.mark.parametrize("arguments", USAGES)
def test_wrong_arguments_are_neither_success_nor_absence(hook: Hook, arguments: list[str]) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)) as agent:
        archived, restored = hook.run("archive", *arguments), hook.run("restore", *arguments)
    assert (archived.returncode, restored.returncode, agent.requests) == (1, 255, [])
    assert "See pitr-hook --help. " in archived.stderr
    assert archived.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["push", SEGMENT, SEGMENT], ["--help", "archive"], ["--version", "x"], [""]])
def test_an_unknown_command_is_neither_success_nor_absence(hook: Hook, arguments: list[str]) -> None:
    done = hook.run(*arguments)
    assert done.returncode == 255
    assert done.stderr.startswith("usage: pitr-hook archive PATH NAME")


def test_a_bad_time_out_in_the_environment_is_refused(hook: Hook) -> None:
    misconfigured = Hook(hook.directory, hook.data_directory, hook.socket_path, {"PITR_HOOK_TIMEOUT": "soon"})
    assert (misconfigured.archive(SEGMENT).returncode, misconfigured.restore(SEGMENT).returncode) == (1, 255)


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False), (5000, False)])
def test_a_socket_path_too_long_for_the_system_is_refused_at_once(hook: Hook, length: int, fits: bool) -> None:
    path = "/" + "s" * (length - 1)
    done = hook.archive(SEGMENT, "--socket", path, "--timeout", "1")
    assert done.returncode == 1
    assert ("the path of the agent's socket has not 1 to 107 bytes" in done.stderr) is not fits
    assert len(done.stderr) < 1200


def test_version_and_help_are_given_when_asked_for_alone(hook: Hook) -> None:
    version = subprocess.run([hook.program, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == "pitr-hook test\n"
    usage = subprocess.run([hook.program, "--help"], capture_output=True, text=True, check=True)
    assert "restore_command = 'pitr-hook restore %f %p'" in usage.stdout


def test_the_restored_file_is_private_and_replaces_what_was_there(hook: Hook) -> None:
    hook.destination.write_bytes(b"an older and longer file")
    hook.destination.chmod(0o644)
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        assert hook.restore(SEGMENT).returncode == 0
    assert hook.destination.read_bytes() == CONTENT
    assert stat.S_IMODE(hook.destination.stat().st_mode) == 0o600


def test_a_symlink_at_the_destination_is_replaced_not_followed(hook: Hook, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    hook.destination.symlink_to(victim)
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        assert hook.restore(SEGMENT).returncode == 0
    assert (victim.read_bytes(), hook.destination.is_symlink()) == (b"precious", False)
    assert hook.destination.read_bytes() == CONTENT


def test_pg_wal_may_be_a_symlink_to_another_volume(hook: Hook, tmp_path_factory: pytest.TempPathFactory) -> None:
    volume = tmp_path_factory.mktemp("volume")
    hook.destination.parent.rmdir()
    hook.destination.parent.symlink_to(volume)
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        assert hook.restore(SEGMENT).returncode == 0
    assert (volume / "RECOVERYXLOG").read_bytes() == CONTENT


def test_the_destination_may_be_absolute_or_in_the_current_directory(hook: Hook, tmp_path: Path) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        assert hook.run("restore", SEGMENT, str(tmp_path / "absolute")).returncode == 0
        assert hook.run("restore", SEGMENT, "here").returncode == 0
    assert (tmp_path / "absolute").read_bytes() == (tmp_path / "here").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere/RECOVERYXLOG", 'cannot open the directory of "nowhere/RECOVERYXLOG": No such file or directory'),
        ("pg_wal", 'cannot rename the new file to "pg_wal": '),
        ("pg_wal/", 'cannot rename the new file to "pg_wal/": '),
        ("pg_wal/..", 'cannot rename the new file to "pg_wal/..": '),
        ("x" * 300, 'cannot rename the new file to "xxx'),
        ("x/" * 3000, "cannot open the directory of "),
    ],
)
def test_a_destination_that_cannot_be_written_is_a_failure_that_leaves_nothing(
    hook: Hook, path: str, problem: str
) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        done = hook.run("restore", SEGMENT, path)
    assert done.returncode == 255
    assert problem in done.stderr
    assert [path.name for path in hook.data_directory.rglob("*")] == ["pg_wal"]


def test_what_a_killed_hook_left_behind_is_no_obstacle(hook: Hook) -> None:
    call = f'echo old > pg_wal/xlogtemp.pitr-$$ && exec "{hook.program}" restore {SEGMENT} pg_wal/RECOVERYXLOG'
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)):
        assert finish(hook.start("/bin/sh", "-c", call)).returncode == 0
    assert hook.wal_directory() == ["RECOVERYXLOG"]
    assert hook.destination.read_bytes() == CONTENT


@pytest.fixture(params=["beside", "with spaces", "symlinked", "on PATH"])
def scripts(request: pytest.FixtureRequest, hook: Hook, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stands before the scripts' names in archive_command and restore_command."""
    place = tmp_path_factory.mktemp("place")
    if request.param == "with spaces":
        shutil.copytree(hook.directory, place / "a b")
        return f'"{place}/a b/"'
    if request.param == "symlinked":
        for script in ("wal-archive.sh", "wal-restore.sh"):
            (place / script).symlink_to(os.path.relpath(hook.directory / script, place))
        return f"{place}/"
    if request.param == "on PATH":
        hook.variables["PATH"] = f"{hook.directory}:{os.environ['PATH']}"
        return ""
    return f"{hook.directory}/"


def test_the_scripts_run_the_hook_beside_them(hook: Hook, scripts: str) -> None:
    hook.place(SEGMENT)
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT), reply(410, wal_file=SEGMENT)):
        restored = finish(hook.start("/bin/sh", "-c", f"{scripts}wal-restore.sh {SEGMENT} pg_wal/RECOVERYXLOG"))
        absent = finish(hook.start("/bin/sh", "-c", f"{scripts}wal-restore.sh {SEGMENT} pg_wal/RECOVERYXLOG"))
        archived = finish(hook.start("/bin/sh", "-c", f"{scripts}wal-archive.sh pg_wal/{SEGMENT} {SEGMENT}"))
    assert (restored.returncode, absent.returncode, archived.returncode) == (0, 1, 1)
    assert hook.destination.read_bytes() == CONTENT
    assert "archive 00000001FFFFFFFF000000FF: the agent answered 410" in archived.stderr


@pytest.mark.parametrize(("script", "code"), [("wal-archive.sh", 1), ("wal-restore.sh", 255)])
def test_a_script_without_its_hook_fails_safely_and_says_so(hook: Hook, tmp_path: Path, script: str, code: int) -> None:
    alone = str(shutil.copy(hook.directory / script, tmp_path))
    done = finish(hook.start(alone, SEGMENT, SEGMENT))
    assert done.returncode == code
    assert done.stderr == f'{script}: there is no program "{tmp_path}/pitr-hook". Install pitr-hook beside {script}.\n'


@pytest.mark.parametrize(("script", "code"), [("wal-archive.sh", 1), ("wal-restore.sh", 255)])
def test_a_script_without_arguments_fails_safely(hook: Hook, script: str, code: int) -> None:
    assert finish(hook.start(str(hook.directory / script))).returncode == code
