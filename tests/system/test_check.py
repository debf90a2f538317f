"""`pitr check` on a real server, agent and S3 server: what it says when all is well, and of what is not."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import pytest

from agent.lab.agent_process import AgentProcess, agent_environment, run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import make_temporary_directory
from agent.lab.processes import kill_all_in
from agent.lab.seaweedfs import SeaweedServer
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.postgres import FindBinaries
from tests.support.s3 import BUCKET
from tests.support.stack import MakeStack

pytestmark = pytest.mark.xdist_group("check")  # one stack for all of them


@dataclass
class Lab:
    """A server that archives, its agent and its repository: all as it should be. Leave it so."""

    cluster: PostgresCluster
    agent: AgentProcess
    prefix: str


@pytest.fixture(scope="module")
def lab(s3_server: SeaweedServer, postgres_binaries: FindBinaries, hook_directory: Path) -> Iterator[Lab]:
    """One stack for the module."""
    directory = make_temporary_directory("pitr-check-")
    prefix = f"check/{uuid.uuid4().hex[:8]}"
    socket = directory / "agent" / "agent.sock"
    cluster = PostgresCluster(directory / "pg", postgres_binaries(18), environment={"PITR_SOCKET": str(socket)})
    cluster.initdb(segment_megabytes=1)
    command = f"{hook_directory / 'wal-archive.sh'} %p %f"
    cluster.configure(fsync=False, archive_mode="on", archive_command=command, archive_timeout=3600)
    repository = s3_server.environment(BUCKET, prefix)
    settings = {**repository, **cluster.client_environment, "PITR_BACKUP_SCHEDULE": ""}
    with AgentProcess(directory / "agent", settings) as agent, cluster:
        agent.start()
        cluster.start()
        done = run_pitr("backup", "now", settings=agent.settings)  # without one, that is what is wrong
        assert done.returncode == 0, done.stderr
        yield Lab(cluster, agent, prefix)
    kill_all_in(directory)
    shutil.rmtree(directory)


def check(lab: Lab, *arguments: str, code: int = 0, **settings: str) -> dict[str, Mapping[str, Any]]:
    """Return what `pitr check` says of each thing; without a WAL switch, unless `arguments` want one."""
    done = run_pitr("check", "--json", *(arguments or ["--no-switch"]), settings={**lab.agent.settings, **settings})
    assert done.returncode == code, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["exit_code"]) == (code == 0, code)
    # What the agent finds wrong depends on the machine: how fast its volume fills up, for one.
    return {each["check"]: each for each in answer["checks"] if each["check"] != "agent's word"}


def results(checks: Mapping[str, Mapping[str, Any]], result: str) -> list[str]:
    return [name for name, each in checks.items() if each["result"] == result]


def test_all_passes_where_all_is_well_and_nothing_is_left_in_the_bucket(lab: Lab, s3_server: SeaweedServer) -> None:
    checks = check(lab, "--switch")
    assert results(checks, "pass") == list(checks)
    told = re.fullmatch(
        r"[0-9A-F]{24} was in the repository after (\d+\.\d) s: time for (\d+) like it in PITR_DRAIN_TIMEOUT",
        checks["WAL switch"]["text"],
    )
    assert told is not None
    seconds, segments = float(told[1]), int(told[2])
    fewest, most = (90 / max(0.25, seconds + error) for error in (0.05, -0.05))  # 90 s is its default
    assert fewest - 1 <= segments <= most + 1
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
    )
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=lab.prefix)
    assert [entry["Key"] for entry in listed["Contents"] if "_005/" not in entry["Key"]] == []


def test_people_read_a_page_with_words_and_fixes(lab: Lab) -> None:
    done = run_pitr("check", "--no-switch", settings={**lab.agent.settings, "PGDATA": "/nowhere"})
    assert done.returncode == 10
    page = " ".join(done.stdout.split())  # wherever its lines are folded
    for words in (
        "FAIL PGDATA /nowhere/global/pg_control cannot be read: No such file or directory",
        "-> Set PGDATA to PostgreSQL's data directory, mount its volumes into this container, and run the agent as a "
        "user that may read them.",
        "SKIP WAL switch left out, as asked",
        "1 FAIL, 1 SKIP",
    ):
        assert words in page


def test_the_sql_that_is_printed_for_a_role_grants_all_it_lacks(lab: Lab) -> None:
    lab.cluster.execute('CREATE ROLE "back up" LOGIN')
    checks = check(lab, "--switch", code=11, PGUSER="back up")
    assert results(checks, "fail") == ["role"]
    assert results(checks, "skip") == ["WAL switch"]
    where, *statements = checks["role"]["fix"].splitlines()
    assert where == "As a superuser, in database postgres:"
    lab.cluster.execute(*statements)
    checks = check(lab, "--switch", PGUSER="back up")
    assert results(checks, "pass") == list(checks)


def test_credentials_that_may_only_read_fail_at_the_first_put(lab: Lab, s3_server: SeaweedServer) -> None:
    reader = {
        "AWS_ACCESS_KEY_ID": s3_server.reader_access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.reader_secret_key,
    }
    checks = check(lab, code=21, **reader)
    assert results(checks, "fail") == ["PUT"]
    assert "AccessDenied" in checks["PUT"]["text"]
    assert [checks[name]["result"] for name in ("LIST", "GET", "DELETE", "checksums")] == [
        "pass",
        "skip",
        "skip",
        "skip",
    ]


def test_a_bucket_that_is_not_there_is_told_once(lab: Lab) -> None:
    checks = check(lab, code=21, WALG_S3_PREFIX="s3://no-such-bucket/x")
    assert results(checks, "fail") == ["LIST"]
    assert checks["LIST"]["text"].endswith('bucket "no-such-bucket" does not exist')
    assert checks["identity, encryption"]["result"] == "skip"


def test_no_credentials_leave_the_rest_to_be_looked_at(lab: Lab) -> None:
    nothing = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    nothing |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nowhere")
    nothing |= {"AWS_EC2_METADATA_DISABLED": "true"}
    checks = check(lab, code=21, **nothing)
    assert results(checks, "fail") == ["store"]
    assert checks["role"]["result"] == checks["PGDATA"]["result"] == "pass"


def test_an_agent_that_is_down_is_told_and_no_wal_is_switched(lab: Lab) -> None:
    checks = check(lab, "--switch", code=12, PITR_SOCKET=str(lab.agent.directory / "other.sock"))
    assert results(checks, "fail") == ["agent"]
    assert (checks["WAL switch"]["result"], checks["WAL switch"]["text"]) == ("skip", "no agent runs here")


def test_a_server_that_does_not_archive_is_told_how_to_begin(lab: Lab, postgres_binaries: FindBinaries) -> None:
    """Archiving that is off, then archiving to nowhere, in the repository of another database cluster."""
    directory = make_temporary_directory("pitr-check-")
    try:
        with PostgresCluster(directory / "pg", postgres_binaries(18)) as other:
            other.initdb("--no-data-checksums", segment_megabytes=1, checksums=False)
            other.configure(fsync=False, archive_mode="off")
            other.start()
            lab.cluster.wait_until_archived(lab.cluster.switch_wal())
            checks = check(lab, "--switch", code=10, **other.client_environment)
            assert results(checks, "fail") == ["archive_mode", "identity"]
            assert checks["identity"]["exit_code"] == 31
            assert results(checks, "warn") == ["archive_timeout", "data_checksums"]
            assert "wal-archive.sh %p %f" in checks["archive_command"]["fix"]
            assert checks["WAL switch"]["text"] == "archive_mode is off"

            other.execute(
                "ALTER SYSTEM SET archive_mode = 'on'",
                "ALTER SYSTEM SET archive_command = '/bin/true'",
                "SELECT pg_reload_conf()",
            )
            other.restart()
            checks = check(lab, "--switch", code=10, **other.client_environment)
            assert results(checks, "fail") == ["archive_command", "identity", "WAL switch"]
            assert "'/bin/true' tells PostgreSQL that WAL is archived" in checks["archive_command"]["text"]
            assert re.search("PostgreSQL takes [0-9A-F]{24} for archived, and it is not", checks["WAL switch"]["text"])

            checks = check(lab, code=10, PGDATA=str(other.data_directory))
            assert results(checks, "fail") == ["PGDATA"]
            assert "Correct PGDATA" in checks["PGDATA"]["fix"]
    finally:
        kill_all_in(directory)
        shutil.rmtree(directory)


async def test_credentials_that_may_not_delete_archive_and_back_up_and_the_check_warns(
    make_stack: MakeStack, s3_server: SeaweedServer, s3_environment: dict[str, str]
) -> None:
    async with FaultProxy(s3_server.endpoint) as proxy:
        proxy.add(Fault("DELETE", status=403, code="AccessDenied", times=1000))
        proxy.add(Fault("POST", path="delete", status=403, code="AccessDenied", times=1000))
        repository = {**s3_environment, "AWS_ENDPOINT": proxy.endpoint}
        stack = await asyncio.to_thread(make_stack, repository=repository)
        done = await asyncio.to_thread(run_pitr, "backup", "now", settings=stack.agent.settings)
        assert done.returncode == 0, done.stderr
        checks = await asyncio.to_thread(check, Lab(stack.cluster, stack.agent, ""), "--switch")
    assert results(checks, "warn") == ["archive_timeout", "DELETE", "probe objects"]
    assert re.search("could not be removed: pitr_probe_[0-9a-f]+_small", checks["probe objects"]["text"])
    assert checks["WAL switch"]["result"] == "pass"


def test_a_directory_store_is_tried_like_a_bucket(lab: Lab) -> None:
    directory = make_temporary_directory("pitr-check-")
    try:
        checks = check(lab, WALG_S3_PREFIX="", WALG_FILE_PREFIX=str(directory))
        assert results(checks, "pass") == [name for name in checks if name != "WAL switch"]
        assert "versioning" not in checks
        assert list(directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


def test_the_version_is_printed_and_the_shell_completes_commands_without_settings() -> None:
    assert run_pitr("--version", settings={}).stdout == f"pitr {version('postgres-pitr')}\n"
    completing = {"_PITR_COMPLETE": "complete_bash", "COMP_WORDS": "pitr backup u", "COMP_CWORD": "2"}
    main = "from agent.cli.main import app; app(prog_name='pitr')"
    done = subprocess.run(
        [sys.executable, "-c", main], env=agent_environment(completing), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["unpin"], done.stderr
