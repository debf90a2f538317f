"""One reply of the agent, one exit code: hooks/exit_codes.h, row by row, and what is no reply at all."""

import os
import re
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hooks.calling import Hook, without_seconds
from tests.hooks.scripted_agent import Reply, ScriptedAgent, reply

pytestmark = pytest.mark.parametrize("hook", ["", "arm64"], indirect=True, ids=["this machine", "arm64"])

SEGMENT = "000000010000000A000000FE"
OTHER = "000000010000000A000000FF"
CONTENT = bytes(range(256)) * 1024

REFUSALS = [100, 202, 204, 301, 400, 403, 404, 409, 500, 502, 504]
FINAL_REFUSALS = [400, 502]  # of a restore

NOT_VERDICTS: dict[str, bytes] = {
    "no wal file named": reply(200, CONTENT),
    "another wal file named": reply(200, CONTENT, wal_file=OTHER),
    "a longer name": reply(200, CONTENT, wal_file=SEGMENT + ".partial"),
    "named twice": reply(200, CONTENT, wal_file=SEGMENT, Pitr_Wal_File=SEGMENT),
    "absent, no wal file named": reply(410),
    "absent, another wal file named": reply(410, wal_file=OTHER),
    "chunked": reply(200, b"3\r\nabc\r\n0\r\n\r\n", wal_file=SEGMENT, Transfer_Encoding="chunked"),
    "two lengths": reply(200, CONTENT, wal_file=SEGMENT, Content_Length="3", content_length="4"),
    "a negative length": reply(200, CONTENT, wal_file=SEGMENT, Content_Length="-1"),
    "an endless length": reply(200, CONTENT, wal_file=SEGMENT, Content_Length="9" * 40),
    "http/1.0": reply(200, CONTENT, wal_file=SEGMENT).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "http/2": b"HTTP/2 200\r\nPitr-Wal-File: %s\r\nContent-Length: 0\r\n\r\n" % SEGMENT.encode(),
    "status of four digits": reply(200, CONTENT, wal_file=SEGMENT).replace(b" 200 ", b" 2000 "),
    "a header without a colon": reply(200, CONTENT, wal_file=SEGMENT).replace(b"Pitr", b"oops\r\nPitr", 1),
    "a NUL in a header": reply(200, CONTENT, wal_file=SEGMENT, Server="a\0b"),
    "a bare line feed": reply(200, CONTENT, wal_file=SEGMENT, Server="a\nb"),
    "a folded header": reply(200, CONTENT, wal_file=SEGMENT).replace(b"Pitr-", b"X: y\r\n Pitr-", 1),
    "an endless head": reply(200, CONTENT, wal_file=SEGMENT, X="y" * 9000),
    "another protocol": b"220 mail.example ESMTP\r\n\r\n",
}  # fmt: skip

NOT_FILES: dict[str, bytes] = {
    "no length": reply(200, wal_file=SEGMENT).replace(b"Content-Length: 0\r\n", b"") + CONTENT,
    "length zero": reply(200, b"", wal_file=SEGMENT),
    "longer than any wal file": reply(200, CONTENT, wal_file=SEGMENT, Content_Length=str((1 << 30) + 1)),
    "longer than it says": reply(200, b"abcd", wal_file=SEGMENT, Content_Length="3"),
}


def test_archive_exits_0_when_the_agent_says_that_this_file_is_durable(hook: Hook) -> None:
    file = hook.place(SEGMENT)
    file.write_bytes(CONTENT)
    os.utime(file, ns=(0, 1763870000_000000456))
    file.chmod(0o400)
    with ScriptedAgent(hook.socket_path, reply(200, wal_file=SEGMENT)) as agent:
        done = hook.run("archive", f"pg_wal/{SEGMENT}", SEGMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert agent.requests == [
        b"POST /v1/wal/000000010000000A000000FE HTTP/1.1\r\nHost: pitr\r\nConnection: close\r\n"
        b"Content-Length: 0\r\nPitr-File: 262144:1763870000.000000456\r\nPitr-Deadline: %d\r\n\r\n"
        % agent.deadlines()[0]
    ]


def test_restore_exits_0_with_the_file_in_place(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)) as agent:
        done = hook.restore(SEGMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert hook.destination.read_bytes() == CONTENT
    assert hook.wal_directory() == ["RECOVERYXLOG"]
    directory = hook.destination.parent.stat()
    assert re.fullmatch(
        rb"GET /v1/wal/000000010000000A000000FE HTTP/1\.1\r\nHost: pitr\r\nConnection: close\r\n"
        rb"Pitr-Place: %d:%d:xlogtemp\.pitr-\d+\r\nPitr-Deadline: %d\r\n\r\n"
        % (directory.st_dev, directory.st_ino, agent.deadlines()[0]),
        agent.requests[0],
    )


def place(hook: Hook, agent: ScriptedAgent, connection: socket.socket) -> None:
    """Put the file where the hook's last request offers a place, then say so."""
    offered = re.search(rb"Pitr-Place: \d+:\d+:(\S+)", agent.requests[-1])
    assert offered is not None
    (hook.destination.parent / offered[1].decode()).write_bytes(CONTENT)
    connection.sendall(reply(201, wal_file=SEGMENT))


def test_restore_exits_0_with_the_file_that_the_agent_has_put_in_the_place_offered(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, lambda connection: place(hook, agent, connection)) as agent:
        done = hook.restore(SEGMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert hook.destination.read_bytes() == CONTENT
    assert hook.wal_directory() == ["RECOVERYXLOG"]


def test_restore_exits_255_when_nothing_lies_in_the_place_offered(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(201, wal_file=SEGMENT)):
        done = hook.restore(SEGMENT)
    assert done.returncode == 255
    assert "did not put the file" in done.stderr
    assert hook.wal_directory() == []


def test_who_asks_for_a_segment_under_its_own_name_is_offered_nothing(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(200, CONTENT, wal_file=SEGMENT)) as agent:
        done = hook.run("restore", SEGMENT, f"pg_wal/{SEGMENT}")
    assert done.returncode == 0
    assert b"Pitr-Place" not in agent.requests[0]


def test_an_archive_call_takes_no_201_for_a_verdict(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(201, wal_file=SEGMENT)):
        assert hook.archive(SEGMENT).returncode == 1


def test_restore_exits_1_without_a_word_when_the_file_is_proven_absent(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(410, b"not there\n", wal_file=SEGMENT)):
        done = hook.restore(SEGMENT)
    assert (done.returncode, done.stderr, hook.wal_directory()) == (1, "", [])


def test_archive_takes_absent_for_a_failure(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(410, wal_file=SEGMENT)):
        assert hook.archive(SEGMENT).returncode == 1


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_to_archive_is_final_and_its_first_line_is_passed_on(hook: Hook, status: int) -> None:
    refusal = reply(status, b"it holds other bytes. Find out who wrote them.\nmore\n", wal_file=SEGMENT)
    with ScriptedAgent(hook.socket_path, refusal) as agent:
        archived = hook.archive(SEGMENT)
    assert (archived.returncode, len(agent.requests)) == (1, 1)
    assert archived.stderr == (
        f"pitr-hook: archive {SEGMENT}: the agent answered {status}: it holds other bytes. Find out who wrote them. "
        "The agent's log says more. PostgreSQL keeps the file and asks again.\n"
    )


@pytest.mark.parametrize("status", FINAL_REFUSALS)
def test_a_restore_that_is_wrong_or_meets_damage_fails_at_once(hook: Hook, status: int) -> None:
    with ScriptedAgent(hook.socket_path, reply(status, b"it is damaged\n", wal_file=SEGMENT)) as agent:
        restored = hook.restore(SEGMENT)
    assert (restored.returncode, len(agent.requests), hook.wal_directory()) == (255, 1, [])
    assert f"the agent answered {status}: it is damaged. " in restored.stderr
    assert restored.stderr.endswith(
        " Recovery stops here and loses nothing: once this is mended, start PostgreSQL again.\n"
    )


@pytest.mark.parametrize("status", sorted(set(REFUSALS) - set(FINAL_REFUSALS)))
def test_a_restore_asks_again_after_any_other_refusal(hook: Hook, status: int) -> None:
    refusal = reply(status, b"uid 1 may not use this socket\n", wal_file=SEGMENT)
    with ScriptedAgent(hook.socket_path, refusal, refusal, reply(200, CONTENT, wal_file=SEGMENT)) as agent:
        assert hook.restore(SEGMENT).returncode == 0
    assert len(agent.requests) == 3
    assert hook.destination.read_bytes() == CONTENT


def test_a_restore_that_is_refused_until_its_deadline_fails_with_the_reason(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(500, b"the store is on fire\n")) as agent:
        restored = hook.restore(SEGMENT, "--timeout", "1")
    assert (restored.returncode, len(agent.requests) > 4, hook.wal_directory()) == (255, True, [])
    assert "the agent answered 500: the store is on fire (waited N s). " in without_seconds(restored.stderr)


@pytest.mark.parametrize("answer", NOT_VERDICTS.values(), ids=NOT_VERDICTS)
def test_an_answer_that_is_no_verdict_is_neither_success_nor_absence(hook: Hook, answer: bytes) -> None:
    with ScriptedAgent(hook.socket_path, answer):
        assert (hook.archive(SEGMENT).returncode, hook.restore(SEGMENT).returncode) == (1, 255)
    assert hook.wal_directory() == []


@pytest.mark.parametrize("answer", NOT_FILES.values(), ids=NOT_FILES)
def test_a_body_that_cannot_be_a_wal_file_is_refused(hook: Hook, answer: bytes) -> None:
    with ScriptedAgent(hook.socket_path, answer):
        assert hook.restore(SEGMENT).returncode == 255
    assert hook.wal_directory() == []


def test_not_now_is_asked_again(hook: Hook) -> None:
    not_now = reply(503, b"the agent starts\n")
    with ScriptedAgent(hook.socket_path, not_now, not_now, reply(200, CONTENT, wal_file=SEGMENT)) as agent:
        assert hook.restore(SEGMENT).returncode == 0
    assert len(agent.requests) == 3
    assert hook.destination.read_bytes() == CONTENT


def test_not_now_until_the_deadline_is_a_failure_that_gives_the_reason(hook: Hook) -> None:
    with ScriptedAgent(hook.socket_path, reply(503, b"the bucket does not answer\n")) as agent:
        archived, restored = hook.archive(SEGMENT, "--timeout", "1"), hook.restore(SEGMENT, "--timeout", "1")
    assert (archived.returncode, restored.returncode) == (1, 255)
    assert "the agent answered 503: the bucket does not answer (waited N s). " in without_seconds(archived.stderr)
    assert len(agent.requests) > 4
    assert set(agent.deadlines()) == {1}


def test_headers_are_read_whatever_their_case_and_spacing(hook: Hook) -> None:
    verdict = f"HTTP/1.1 410 Gone\r\nPITR-WAL-FILE: \t{SEGMENT} \r\nX-Other:\r\n\r\n"
    with ScriptedAgent(hook.socket_path, verdict.encode()):
        assert hook.restore(SEGMENT).returncode == 1


@pytest.mark.parametrize(
    "body", [b"\x1b[2Jgone\r\n", b"a\0b\x07\n", "größer\n".encode(), b"x" * 100_000, b"%s%n%d\n", b""]
)
def test_whatever_the_agent_says_stderr_is_one_short_line_of_printable_ascii(hook: Hook, body: bytes) -> None:
    with ScriptedAgent(hook.socket_path, reply(500, body)):
        done = hook.archive(SEGMENT)
    assert done.returncode == 1
    line, newline, rest = done.stderr.partition("\n")
    assert (newline, rest) == ("\n", "")
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 1200


def restore_codes(hook: Hook, answer: Reply) -> int:
    """Return the exit code of a restore that is answered so, and with a refusal if it asks again."""
    hook.socket_path.unlink(missing_ok=True)
    with ScriptedAgent(hook.socket_path, answer, reply(502)):
        return hook.restore(SEGMENT).returncode


bounded = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@bounded
@given(
    noise=st.binary(max_size=300),
    prefix=st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 410\r\n"]),
)
def test_noise_never_restores_and_never_proves_absence(hook: Hook, noise: bytes, prefix: bytes) -> None:
    assert restore_codes(hook, prefix + noise) == 255
    assert hook.wal_directory() == []


@bounded
@given(data=st.data(), verdict=st.sampled_from([reply(200, b"x" * 64, wal_file=SEGMENT), reply(410, wal_file=SEGMENT)]))
def test_a_verdict_cut_short_anywhere_is_none(hook: Hook, data: st.DataObject, verdict: bytes) -> None:
    end = data.draw(st.integers(0, len(verdict) - 1))
    assert restore_codes(hook, verdict[:end]) == 255
    assert hook.wal_directory() == []


@bounded
@given(
    data=st.data(),
    verdict=st.sampled_from([reply(200, b"x" * 64, wal_file=SEGMENT), reply(410, wal_file=SEGMENT)]),
    byte=st.integers(0, 255),
)
def test_a_verdict_with_another_status_or_name_is_none(
    hook: Hook, data: st.DataObject, verdict: bytes, byte: int
) -> None:
    name_at = verdict.index(SEGMENT.encode())
    places = [*range(len(b"HTTP/1.1 200")), *range(name_at, name_at + len(SEGMENT))]
    at = data.draw(st.sampled_from(places))
    if byte != verdict[at]:
        assert restore_codes(hook, verdict[:at] + bytes([byte]) + verdict[at + 1 :]) == 255
        assert hook.wal_directory() == []
