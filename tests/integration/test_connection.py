"""What the agent asks of PostgreSQL, on every supported version; and what it says when PostgreSQL refuses."""

import asyncio
import inspect
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from agent.domain.backup_label import parse_backup_label
from agent.domain.checks import Verdict
from agent.domain.lsn import parse_lsn
from agent.domain.server_checks import SETTINGS, functions_needed, role_finding
from agent.environment import Secret
from agent.errors import PostgresError
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.waiting import wait_until
from agent.ports import NoSummaries
from agent.postgres.connection import PostgresServer, postgres_error
from agent.settings import PostgresSettings
from tests.support.postgres import MakeCluster

VERSIONS = [13, 14, 15, 16, 17, 18]


def settings_of(cluster: PostgresCluster) -> PostgresSettings:
    return PostgresSettings(str(cluster.socket_directory), cluster.port, "postgres", None, "postgres")


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> PostgresCluster:
    """A running PostgreSQL 15 that archives nowhere."""
    cluster = make_cluster(15, archive_mode="on", archive_command="true")
    cluster.start()
    return cluster


@pytest.mark.parametrize("major", VERSIONS)
async def test_a_server_says_who_it_is_and_starts_and_stops_a_backup(make_cluster: MakeCluster, major: int) -> None:
    cluster = make_cluster(major, archive_mode="on", archive_command="true", wal_log_hints="on")
    cluster.start()
    # The role's own limits must not reach the session that a backup lives in.
    cluster.execute(
        "CREATE ROLE hurried SUPERUSER LOGIN",
        "ALTER ROLE hurried SET statement_timeout = '400ms'",
        *(["ALTER ROLE hurried SET idle_session_timeout = '400ms'"] if major >= 14 else []),
        *(["ALTER ROLE hurried SET transaction_timeout = '400ms'"] if major >= 17 else []),
    )
    server = PostgresServer(replace(settings_of(cluster), user="hurried"))
    info = await server.server()
    assert info.version_num // 10000 == major
    assert info.data_directory == str(cluster.data_directory)
    assert (info.in_recovery, info.timeline, info.segment_bytes) == (False, 1, 1 << 20)
    assert (info.archive_mode, info.archive_command, info.archive_library) == ("on", "true", "")
    assert (info.wal_level, info.wal_log_hints) == ("replica", True)
    with cluster.connect() as session:
        row = session.execute(
            "SELECT system_identifier, pg_postmaster_start_time() FROM pg_control_system()"
        ).fetchone()
    assert row == (info.system_identifier, info.started_at)

    async with server.backup_session() as backup:
        start = await backup.start("a label")
        await asyncio.sleep(0.6)  # longer than any of the limits: that nothing happens is what is tested
        await backup.ping()
        stop = await backup.stop()
    label = parse_backup_label(stop.backup_label.decode())
    assert label.start_lsn == start < stop.stop_lsn
    assert b"\nLABEL: a label\n" in stop.backup_label
    assert stop.backup_label.endswith(b"START TIMELINE: 1\n")
    assert stop.tablespace_map == b""
    cluster.execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
    before = cluster.value("SELECT pg_current_wal_lsn()::text")
    assert await server.switch_wal() > parse_lsn(before)


async def test_the_tablespace_map_comes_byte_for_byte(cluster: PostgresCluster) -> None:
    location = cluster.data_directory.with_name("späce\nline")
    location.mkdir()
    hand_over(location)
    cluster.execute(f"CREATE TABLESPACE space LOCATION '{location}'")
    async with PostgresServer(settings_of(cluster)).backup_session() as backup:
        await backup.start("x")
        stop = await backup.stop()
    oid, path = stop.tablespace_map.split(b" ", 1)
    assert oid.isdigit()
    assert path == str(location).replace("\n", "\\\n").encode() + b"\n"


async def test_leaving_the_session_aborts_the_backup(cluster: PostgresCluster) -> None:
    async with PostgresServer(settings_of(cluster)).backup_session() as backup:
        await backup.start("x")
    wait_until(
        lambda: "aborting backup due to backend exiting" in cluster.log_text(), seconds=60, what="the server's warning"
    )


async def test_the_next_backup_may_begin_as_soon_as_one_has_ended(cluster: PostgresCluster) -> None:
    server = PostgresServer(settings_of(cluster))
    for _ in range(400):
        async with server.only_backup():
            pass


async def test_the_session_names_itself(cluster: PostgresCluster) -> None:
    async with PostgresServer(settings_of(cluster)).backup_session() as backup:
        await backup.start("x")
        names = [name for (name,) in cluster.query("SELECT application_name FROM pg_stat_activity")]
        assert "pitr base backup" in names


async def test_functions_of_other_schemas_are_not_mistaken_for_postgresqls(cluster: PostgresCluster) -> None:
    cluster.execute(
        "CREATE FUNCTION public.pg_backup_start(label text, fast boolean) RETURNS pg_lsn"
        " LANGUAGE sql AS $$ SELECT '0/1'::pg_lsn $$",
        "ALTER ROLE postgres SET search_path = public, pg_catalog",
    )
    async with PostgresServer(settings_of(cluster)).backup_session() as backup:
        assert await backup.start("x") > 1


async def test_a_role_without_rights_is_told_which_to_grant(cluster: PostgresCluster) -> None:
    cluster.execute("CREATE ROLE weak LOGIN")
    server = PostgresServer(replace(settings_of(cluster), user="weak"))
    with pytest.raises(PostgresError, match="data_directory") as caught:
        await server.server()
    assert "GRANT pg_read_all_settings" in caught.value.hint
    async with server.backup_session() as backup:
        with pytest.raises(PostgresError, match="permission denied for function pg_backup_start") as caught:
            await backup.start("x")
    assert "EXECUTE on pg_backup_start" in caught.value.hint
    cluster.execute(
        "GRANT pg_read_all_settings TO weak",
        "GRANT EXECUTE ON FUNCTION pg_backup_start, pg_backup_stop, pg_switch_wal TO weak",
    )
    assert (await server.server()).timeline == 1
    async with server.backup_session() as backup:
        await backup.start("x")
        await backup.stop()
    await server.switch_wal()


async def test_a_wrong_password_is_told_without_showing_it(cluster: PostgresCluster) -> None:
    cluster.execute("ALTER ROLE postgres PASSWORD 'right'")
    (cluster.data_directory / "pg_hba.conf").write_text("local all all scram-sha-256\n")
    cluster.restart()
    settings = replace(settings_of(cluster), password=Secret("canary"))
    with pytest.raises(PostgresError, match="password authentication failed") as caught:
        await PostgresServer(settings).server()
    assert "PGPASSWORD" in caught.value.hint
    assert "canary" not in caught.value.one_line() + str(caught.value.__cause__)
    assert (await PostgresServer(replace(settings, password=Secret("right"))).server()).timeline == 1


async def test_a_database_that_does_not_exist_is_named(cluster: PostgresCluster) -> None:
    with pytest.raises(PostgresError, match='database "nowhere" does not exist') as caught:
        await PostgresServer(replace(settings_of(cluster), database="nowhere")).server()
    assert "PGDATABASE" in caught.value.hint


def test_a_server_on_its_way_down_or_up_is_told_as_such() -> None:
    starting = psycopg.OperationalError("connection failed: FATAL:  the database system is starting up")
    assert "accepts connections" in postgres_error(starting, "connect").hint


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody else can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "words", "hint"),
    [
        ("/nowhere", "No such file", "PGHOST"),
        ("127.0.0.1", "refused", "Check that PostgreSQL runs"),
        ("no-such-host.invalid", "no-such-host.invalid", "PGHOST"),
    ],
)
async def test_a_server_that_is_not_there_is_told_with_its_address(
    host: str, words: str, hint: str, closed_port: int
) -> None:
    settings = PostgresSettings(host, closed_port, "postgres", None, "postgres")
    with pytest.raises(PostgresError, match=words) as caught:
        await PostgresServer(settings).server()
    assert f"cannot connect to PostgreSQL at {host}:{closed_port} as postgres" in caught.value.message
    assert hint in caught.value.hint


async def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.postgres.connection._CONNECT_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        settings = PostgresSettings("127.0.0.1", silent.getsockname()[1], "postgres", None, "postgres")
        with pytest.raises(PostgresError, match=r"timeout|did not answer within") as caught:
            await PostgresServer(settings).server()
    assert caught.value.hint


async def test_a_session_that_falls_silent_is_given_up(
    cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pitr base backup'"
    async with PostgresServer(settings_of(cluster)).backup_session() as session:
        backend = cluster.value(find)
        monkeypatch.setattr("agent.postgres.connection._rows.__defaults__", ((), 1.0))
        os.kill(backend, signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):
                with pytest.raises(PostgresError, match="did not answer within 1 s"):
                    await session.ping()
        finally:
            os.kill(backend, signal.SIGCONT)


def psycopg_errors() -> list[type[psycopg.Error]]:
    """Return every class of error that psycopg has."""
    modules = (psycopg, psycopg.errors)
    return sorted(
        {
            value
            for module in modules
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, psycopg.Error)
        },
        key=lambda error: error.__name__,
    )


@pytest.mark.parametrize("error", psycopg_errors())
def test_every_error_of_psycopg_becomes_ours_with_a_next_step(error: type[psycopg.Error]) -> None:
    for instance in (error("first line\nsecond"), error()):
        ours = postgres_error(instance, "do this")
        assert re.fullmatch(r"cannot do this: \S.*", ours.message)
        assert ours.hint.endswith(".")
        assert "\n" not in ours.message


@pytest.mark.parametrize("major", VERSIONS)
async def test_the_grants_that_a_check_prints_are_what_the_agent_needs(make_cluster: MakeCluster, major: int) -> None:
    cluster = make_cluster(major, archive_mode="on", archive_command="true")
    cluster.start()
    cluster.execute("CREATE ROLE weak LOGIN")
    server = PostgresServer(replace(settings_of(cluster), user="weak"))
    before = await server.facts()
    assert (before.role, before.is_superuser, before.reads_settings) == ("weak", False, False)
    assert before.may_execute == dict.fromkeys(functions_needed(major), False)
    with pytest.raises(PostgresError, match="permission denied for function pg_switch_wal"):
        await server.finish_segment()
    cluster.execute(*role_finding(before).fix.splitlines()[1:])

    after = await server.facts()
    assert role_finding(after).verdict is Verdict.PASS
    known = {*SETTINGS} - ({"archive_library"} if major < 15 else set()) - ({"summarize_wal"} if major < 17 else set())
    assert {*after.settings} == known
    assert (await server.server()).system_identifier == after.system_identifier
    async with server.backup_session() as backup:
        await backup.start("x")
        await backup.stop()
    segment = await server.finish_segment()
    assert (cluster.data_directory / "pg_wal" / segment).exists()
    cluster.wait_until_archived(segment)
    async with asyncio.timeout(60):
        while (await server.archiver()).last_archived < segment:  # told after the file's status is changed
            pass
    if major >= 17:
        assert isinstance(await server.changed_blocks((), 0, 1), NoSummaries)
        assert cluster.value("SELECT has_function_privilege('weak', 'pg_available_wal_summaries()', 'EXECUTE')")
