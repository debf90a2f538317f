"""The built images, run as Kubernetes' `restricted` demands: no root, read-only root, no capabilities, any uid.

`make test-images` builds them and runs this; without images it is skipped. Needs podman (or docker: PITR_TEST_RUNTIME).
"""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.lab.seaweedfs import free_ports
from agent.lab.waiting import wait_until

RUNTIME = os.environ.get("PITR_TEST_RUNTIME", "podman")
IMAGE = os.environ.get("PITR_TEST_IMAGE", "")
AGENT_IMAGE = os.environ.get("PITR_TEST_AGENT_IMAGE", "")
SECONDS = 120

pytestmark = [
    pytest.mark.skipif(not IMAGE or not AGENT_IMAGE, reason="make test-images builds the images and tests them"),
    pytest.mark.xdist_group("images"),
]

DATA = "/var/lib/postgresql/pgdata"


@dataclass
class Pod:
    """Containers that share volumes and loopback, as those of one pod do."""

    directory: Path
    uid: int
    environment: dict[str, str]
    started: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http_port = free_ports(1)[0]
        for name in ("data", "pitr-socket", "postgres-socket", "hooks"):
            (self.directory / name).mkdir(parents=True)
            os.chown(self.directory / name, self.uid, self.uid)

    def arguments(self, image: str, *, entrypoint: str | None = None, **environment: str) -> list[str]:
        mounts = {
            "data": "/var/lib/postgresql",
            "pitr-socket": "/run/pitr",
            "postgres-socket": "/var/run/postgresql",
            "hooks": "/pitr-hooks",
        }
        everything = {
            **self.environment,
            "PGDATA": DATA,
            "PGUSER": "postgres",
            "PITR_HTTP_LISTEN": f"127.0.0.1:{self.http_port}",
            **environment,
        }
        return [
            *("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host"),
            *("--user", f"{self.uid}:{self.uid}", "--tmpfs", "/tmp:rw,mode=1777"),
            *(part for name, path in mounts.items() for part in ("--volume", f"{self.directory / name}:{path}")),
            *(part for name, value in everything.items() for part in ("--env", f"{name}={value}")),
            *(("--entrypoint", entrypoint) if entrypoint else ()),
            image,
        ]

    def start(self, role: str, image: str, *command: str, **environment: str) -> str:
        """Start a container in the background; return its name."""
        name = f"pitr-test-{role}-{uuid.uuid4().hex[:8]}"
        self.started.append(name)  # one that does not start is there, too
        run("run", "--detach", "--name", name, *self.arguments(image, **environment), *command)
        return name

    def finish(self, image: str, *command: str, entrypoint: str | None = None, **environment: str) -> str:
        """Run a container to its end, which must be 0; return what it printed."""
        arguments = self.arguments(image, entrypoint=entrypoint, **environment)
        return run("run", "--rm", *arguments, *command)

    def remove(self) -> None:
        for name in self.started:
            subprocess.run([RUNTIME, "rm", "--force", "--volumes", name], capture_output=True, check=False)


def run(*arguments: str) -> str:
    result = subprocess.run([RUNTIME, *arguments], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 0, f"{RUNTIME} {arguments}: {result.stdout}{result.stderr}"
    return result.stdout


def sql(container: str, statement: str) -> str:
    return run("exec", container, "psql", "-XAtq", "-h", "/var/run/postgresql", "-c", statement).strip()


def wait_for_postgres(container: str) -> None:
    def ready() -> bool:
        # The image's entry point runs another server first, for initdb's sake; the one that stays is the first process.
        script = "grep -q postgres /proc/1/comm && psql -XAtq -h /var/run/postgresql -c 'SELECT 1'"
        command = [RUNTIME, "exec", container, "sh", "-c", script]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    wait_until(ready, seconds=SECONDS, what="PostgreSQL to take connections")


@pytest.fixture(params=[999, 70], ids=["the image's user", "another user"])
def pod(request: pytest.FixtureRequest, lab_directory: Path, s3_environment: dict[str, str]) -> Iterator[Pod]:
    if os.geteuid() != 0 or shutil.which(RUNTIME) is None:
        pytest.skip(f"needs {RUNTIME}, and root to hand volumes to other users")
    lab_directory.chmod(0o755)
    pod = Pod(lab_directory / "volumes", request.param, s3_environment)
    yield pod
    pod.remove()


def start_server(pod: Pod, image: str, **settings: str) -> str:
    command = [
        "postgres",
        "-c",
        "listen_addresses=",
        *(part for k, v in settings.items() for part in ("-c", f"{k}={v}")),
    ]
    container = pod.start("postgres", image, *command, POSTGRES_PASSWORD="not used", POSTGRES_USER="postgres")
    wait_for_postgres(container)
    return container


def restored_rows(pod: Pod, agent: str, postgres: str) -> tuple[str, str]:
    """Lose a table and restore to just before in another volume; return what was there, and what came back."""
    sql(postgres, "CREATE TABLE orders AS SELECT generate_series(1, 1000) AS id")
    assert "finished" in run("exec", agent, "pitr", "backup", "now")
    sql(postgres, "INSERT INTO orders SELECT generate_series(1001, 1500)")
    rows, moment = sql(postgres, "SELECT count(*) FROM orders"), sql(postgres, "SELECT to_json(clock_timestamp())")
    sql(postgres, "DROP TABLE orders")
    segment = sql(postgres, "SELECT pg_walfile_name(pg_switch_wal())")
    archived = f"SELECT coalesce(last_archived_wal, '') >= '{segment}' FROM pg_stat_archiver"
    wait_until(lambda: sql(postgres, archived) == "t", seconds=SECONDS, what="the last segment to be archived")
    for container in (postgres, agent):
        run("stop", "--time", "60", container)
    assert '"drained"' in run("logs", agent), "the image's STOPSIGNAL ends the agent at once"

    there = Pod(pod.directory / "restored", pod.uid, pod.environment)
    try:
        target = moment.strip('"')
        there.finish(IMAGE, "pitr", "agent", PITR_MODE="restore", TARGET_TIME=target, AUTO_START="true")
        return rows, sql(start_server(there, IMAGE, archive_mode="off"), "SELECT count(*) FROM orders")
    finally:
        there.remove()


def test_the_image_archives_backs_up_and_restores(pod: Pod) -> None:
    agent = pod.start("agent", IMAGE, "pitr", "agent")
    postgres = start_server(pod, IMAGE)
    rows, back = restored_rows(pod, agent, postgres)
    assert (rows, back) == ("1500", "1500")


def test_the_agents_image_serves_a_server_whose_image_is_as_it_was(pod: Pod) -> None:
    pod.finish(
        AGENT_IMAGE, "-c", "cp /opt/pitr/bin/pitr-hook /opt/pitr/bin/wal-*.sh /pitr-hooks/", entrypoint="/bin/sh"
    )
    agent = pod.start("agent", AGENT_IMAGE)
    command = "/pitr-hooks/wal-archive.sh %p %f"
    postgres = start_server(pod, IMAGE, archive_command=command)
    assert sql(postgres, "SHOW archive_command") == command
    rows, back = restored_rows(pod, agent, postgres)
    assert (rows, back) == ("1500", "1500")


def test_the_socket_is_served_soon_after_the_container_starts(pod: Pod) -> None:
    before = time.monotonic()
    pod.start("agent", AGENT_IMAGE)
    wait_until((pod.directory / "pitr-socket" / "agent.sock").is_socket, seconds=SECONDS, what="the agent's socket")
    print(f"socket served after {time.monotonic() - before:.2f} s")


def test_a_data_directory_that_the_agent_may_not_read_is_told(pod: Pod) -> None:
    data = pod.directory / "data" / Path(DATA).name
    data.mkdir(mode=0o700)
    os.chown(data, pod.uid + 1, pod.uid + 1)
    line = [RUNTIME, "run", "--rm", *pod.arguments(AGENT_IMAGE)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 10
    assert done.stderr.startswith(f"pitr: PGDATA={DATA} cannot be read: Permission denied. Run the agent as the user")


@pytest.mark.parametrize("image", [IMAGE, AGENT_IMAGE])
def test_nothing_that_only_a_build_needs_is_left(image: str) -> None:
    found = run(
        *("run", "--rm", "--network", "none", "--entrypoint", "/bin/sh", image, "-c"),
        "command -v gcc cc pip pip3 git curl; ls /opt/pitr/bin /var/lib/apt/lists",
    )
    names = set(found.split())
    assert not names & {"gcc", "cc", "pip", "pip3"}, found
    assert {"pitr", "pitr-hook", "wal-archive.sh", "wal-restore.sh"} <= names
