"""The one deadline, and what happens until it: agents that come late, die, stall; signals; PostgreSQL stopping."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.lab.waiting import wait_until
from tests.hooks.calling import HOOK_SECONDS, Hook, finish, is_waiting, without_seconds
from tests.hooks.scripted_agent import ScriptedAgent, reply, stall

SEGMENT = "000000020000000000000003"
SECONDS = 60
CONTENT = os.urandom(1 << 20)
ARCHIVED = reply(200, wal_file=SEGMENT)
RESTORED = reply(200, CONTENT, wal_file=SEGMENT)
ARCHIVE = ("archive", f"pg_wal/{SEGMENT}", SEGMENT)
RESTORE = ("restore", SEGMENT, "pg_wal/RECOVERYXLOG")
STARTED = "1\n/data\n1763870000\n5432\n/var/run/postgresql\n\n  5432001    196608\nready   \n"


@pytest.fixture(autouse=True)
def segment_to_archive(hook: Hook) -> None:
    """The file that `ARCHIVE` hands over."""
    hook.place(SEGMENT)


def is_nearly(seconds: list[int], expected: list[int]) -> bool:
    """Tell whether each deadline is the one expected, less the moments it took to ask."""
    return all(most - 20 <= found <= most for found, most in zip(seconds, expected, strict=True))


def start_and_wait(hook: Hook, *arguments: str) -> subprocess.Popen[str]:
    """Start the hook, and return once it waits."""
    process = hook.start(hook.program, *arguments)
    wait_until(lambda: is_waiting(process), seconds=SECONDS, what="the hook to wait")
    return process


@pytest.mark.parametrize(("arguments", "code"), [(ARCHIVE, 1), (RESTORE, 255)])
def test_without_an_agent_the_hook_fails_at_its_deadline_and_says_what_to_do(
    hook: Hook, arguments: tuple[str, ...], code: int
) -> None:
    began = time.monotonic()
    done = hook.run(*arguments, "--timeout", "1")
    assert done.returncode == code
    assert time.monotonic() - began >= 1
    assert (
        f'cannot reach the agent at "{hook.socket_path}": No such file or directory (waited N s). '
        in without_seconds(done.stderr)
    )
    assert "Start the agent, or correct PITR_SOCKET (--socket)." in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [(ARCHIVE, 1), (RESTORE, 255)])
def test_a_silent_agent_holds_the_hook_no_longer_than_its_deadline(
    hook: Hook, arguments: tuple[str, ...], code: int
) -> None:
    began = time.monotonic()
    with ScriptedAgent(hook.socket_path, stall) as agent:
        done = hook.run(*arguments, "--timeout", "1")
    assert done.returncode == code
    assert time.monotonic() - began >= 1
    assert "does not answer (waited N s)" in without_seconds(done.stderr)
    assert len(agent.requests) == 1


def test_an_agent_that_starts_later_is_found(hook: Hook) -> None:
    process = start_and_wait(hook, *RESTORE)
    with ScriptedAgent(hook.socket_path, RESTORED):
        assert finish(process).returncode == 0
    assert hook.destination.read_bytes() == CONTENT


def test_a_socket_that_nobody_listens_on_is_waited_for(hook: Hook) -> None:
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(hook.socket_path))
    process = start_and_wait(hook, *ARCHIVE)
    hook.socket_path.unlink()
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        assert finish(process).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_a_socket_that_postgresql_may_not_use_is_named_as_such(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        hook.socket_path.chmod(0)
        done = hook.archive(SEGMENT, "--timeout", "1")
    assert done.returncode == 1
    assert "Permission denied (waited N s). Run PostgreSQL as the agent's user, or in the group" in without_seconds(
        done.stderr
    )


def test_an_agent_that_dies_before_its_verdict_is_asked_again(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, b"", b"HTTP/1.1 200 OK\r\nPitr-", ARCHIVED) as agent:
        assert hook.archive(SEGMENT).returncode == 0
    assert len(agent.requests) == 3


def test_an_agent_that_dies_while_sending_the_file_is_asked_again(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, RESTORED[:-1], RESTORED[: len(RESTORED) // 2], RESTORED) as agent:
        assert hook.restore(SEGMENT).returncode == 0
    assert len(agent.requests) == 3
    assert hook.destination.read_bytes() == CONTENT
    assert hook.wal_directory() == ["RECOVERYXLOG"]


def test_a_file_that_never_comes_whole_is_never_there(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, RESTORED[:-1]):
        done = hook.restore(SEGMENT, "--timeout", "1")
    assert (done.returncode, hook.wal_directory()) == (255, [])
    assert "hung up before its answer was complete (waited N s)" in without_seconds(done.stderr)


def test_an_agent_that_resets_the_connection_is_asked_again(hook: Hook) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hook.socket_path))
        listener.listen()
        process = hook.start(hook.program, *ARCHIVE)
        connection, _ = listener.accept()
        with connection:  # closed with the request unread, which the hook sees as a reset
            assert connection.recv(1, socket.MSG_PEEK)
    hook.socket_path.unlink()
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        assert finish(process).returncode == 0


def test_an_agent_with_too_many_callers_is_waited_for(hook: Hook) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(str(hook.socket_path))
        listener.listen(0)
        caller.connect(str(hook.socket_path))
        process = start_and_wait(hook, *ARCHIVE)
    hook.socket_path.unlink()
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        assert finish(process).returncode == 0


def test_a_reply_that_comes_byte_by_byte_is_read_whole(hook: Hook) -> None:
    def dribble(connection: socket.socket) -> None:
        for byte in reply(200, b"1\t0/9000000\tno recovery target specified\n", wal_file="00000002.history"):
            connection.sendall(bytes([byte]))

    with ScriptedAgent(hook.socket_path, dribble):
        assert hook.restore("00000002.history").returncode == 0
    assert hook.destination.read_bytes() == b"1\t0/9000000\tno recovery target specified\n"


def test_sigterm_ends_the_hook_as_sigterm(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, stall) as agent:
        process = hook.start(hook.program, *RESTORE)
        assert agent.asked.wait(SECONDS)
        process.terminate()
        done = finish(process)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_a_hook_that_was_stopped_and_continued_goes_on_waiting(hook: Hook) -> None:
    process = start_and_wait(hook, *ARCHIVE)
    for _ in range(3):
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        assert finish(process).returncode == 0


def test_a_closed_stderr_changes_no_exit_code(hook: Hook) -> None:
    with hook.start(hook.program, *RESTORE, "--timeout", "1") as process:
        assert process.stderr
        process.stderr.close()
        assert process.wait(SECONDS) == 255


def test_a_failing_restore_on_a_standby_exits_1_soon_for_postgresql_asks_again(hook: Hook) -> None:
    (hook.data_directory / "standby.signal").touch()
    with ScriptedAgent(hook.socket_path, reply(502)) as agent:
        done = hook.restore(SEGMENT, "--timeout", "60")
    assert done.returncode == 1
    assert done.stderr.endswith(" The standby asks again.\n")
    assert is_nearly(agent.deadlines(), [5])


def test_a_standby_that_is_to_promote_waits_and_aborts_like_any_recovery(hook: Hook) -> None:
    (hook.data_directory / "standby.signal").touch()
    (hook.data_directory / "promote").touch()
    with ScriptedAgent(hook.socket_path, reply(502)) as agent:
        done = hook.restore(SEGMENT, "--timeout", "60")
    assert done.returncode == 255
    assert is_nearly(agent.deadlines(), [60])


def test_a_promotion_that_is_asked_for_meanwhile_is_noticed(hook: Hook) -> None:
    (hook.data_directory / "standby.signal").touch()
    answers = iter([reply(503), RESTORED])

    def answer(connection: socket.socket) -> None:
        (hook.data_directory / "promote").touch()
        connection.sendall(next(answers))

    with ScriptedAgent(hook.socket_path, answer) as agent:
        assert hook.restore(SEGMENT, "--timeout", "60").returncode == 0
    first, second = agent.deadlines()
    assert first <= 5 < second


def test_a_standby_gets_its_files_as_well(hook: Hook) -> None:
    (hook.data_directory / "standby.signal").touch()
    with ScriptedAgent(hook.socket_path, RESTORED):
        assert hook.restore(SEGMENT).returncode == 0


@pytest.mark.parametrize("other", ["recovery.signal", "standby.signals", "pg_wal/standby.signal"])
def test_without_standby_signal_a_failing_restore_aborts_recovery(hook: Hook, other: str) -> None:
    (hook.data_directory / other).touch()
    with ScriptedAgent(hook.socket_path, reply(502)):
        assert hook.restore(SEGMENT).returncode == 255


@pytest.mark.parametrize(
    ("pid_file", "expected"),
    [
        (STARTED.replace("ready   ", "stopping"), 2),
        (STARTED.replace("ready   \n", "stopping"), 2),
        (STARTED, 60),
        (STARTED.replace("/data", "stopping"), 60),
        ("", 60),
        ("1\n/data\n", 60),
        ("stopping", 60),
    ],
)
def test_while_postgresql_stops_archiving_waits_2_seconds_at_most(hook: Hook, pid_file: str, expected: int) -> None:
    (hook.data_directory / "postmaster.pid").write_text(pid_file)
    with ScriptedAgent(hook.socket_path, reply(500)) as agent:
        hook.archive(SEGMENT, "--timeout", "60")
    assert is_nearly(agent.deadlines(), [expected])


def test_a_shutdown_that_begins_while_the_hook_waits_is_noticed(hook: Hook) -> None:
    pid_file = hook.data_directory / "postmaster.pid"
    pid_file.write_text(STARTED)
    with ScriptedAgent(hook.socket_path, stall) as agent:
        process = hook.start(hook.program, *ARCHIVE, "--timeout", str(10 * HOOK_SECONDS))
        assert agent.asked.wait(SECONDS)
        pid_file.write_text(STARTED.replace("ready   ", "stopping"))
        done = finish(process)
    assert done.returncode == 1


def test_nothing_arrives_after_the_process_that_asked_is_gone(hook: Hook) -> None:
    hung_up, parent_gone = threading.Event(), threading.Event()

    def answer_late(connection: socket.socket) -> None:
        connection.sendall(RESTORED[:-1])
        assert parent_gone.wait(SECONDS)
        connection.sendall(RESTORED[-1:])
        stall(connection)
        hung_up.set()

    call = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with ScriptedAgent(hook.socket_path, answer_late) as agent:
        parent = hook.start(sys.executable, "-c", call, hook.program, *RESTORE)
        assert agent.asked.wait(SECONDS)
        parent.kill()
        parent.wait(SECONDS)
        parent_gone.set()
        assert hung_up.wait(SECONDS)
        done = finish(parent)
    wait_until(lambda: hook.wal_directory() == [], seconds=SECONDS, what="the hook to clean up")
    assert "the PostgreSQL process that asked is gone" in done.stderr


def test_a_file_that_cannot_be_written_is_a_failure_that_leaves_nothing(hook: Hook) -> None:
    def no_large_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with ScriptedAgent(hook.socket_path, RESTORED):
        done = subprocess.run(
            [hook.program, *RESTORE],
            cwd=hook.data_directory, env=hook.environment, stderr=subprocess.PIPE, text=True, check=False,
            preexec_fn=no_large_files, restore_signals=False,
        )  # fmt: skip
    assert (done.returncode, hook.wal_directory()) == (255, [])
    assert 'cannot write the file for "pg_wal/RECOVERYXLOG": File too large' in done.stderr


def test_the_agent_hears_of_the_time_that_is_left(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(500)) as agent:
        hook.archive(SEGMENT, "--timeout", "45")
        hook.archive(SEGMENT, "--timeout", "1")
    assert is_nearly(agent.deadlines(), [45, 1])


def test_the_time_out_comes_from_the_environment_unless_it_is_given(hook: Hook) -> None:
    from_environment = Hook(hook.directory, hook.data_directory, hook.socket_path, {"PITR_HOOK_TIMEOUT": "50"})
    with ScriptedAgent(hook.socket_path, reply(502)) as agent:
        from_environment.archive(SEGMENT)
        from_environment.restore(SEGMENT)
        from_environment.archive(SEGMENT, "--timeout", "20")
    assert is_nearly(agent.deadlines(), [50, 50, 20])


def test_the_socket_comes_from_the_environment_unless_it_is_given(hook: Hook) -> None:
    elsewhere = Hook(hook.directory, hook.data_directory, Path("/nonexistent/agent.sock"))
    with ScriptedAgent(hook.socket_path, ARCHIVED):
        assert elsewhere.archive(SEGMENT, "--socket", str(hook.socket_path)).returncode == 0
