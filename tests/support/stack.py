"""Fixtures: the whole of it: PostgreSQL, whose archive_command is our hook, the agent, and a real S3 server."""

import shlex
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over, make_directory
from agent.lab.seaweedfs import SeaweedServer
from tests.support.agent_process import MakeAgent
from tests.support.postgres import MakeCluster
from tests.support.small_volume import SmallVolume

BUCKET = "backups"


@dataclass
class Stack:
    """One server that archives through our hooks; all its parts run."""

    cluster: PostgresCluster
    agent: AgentProcess
    hooks: Path
    repository: Mapping[str, str]
    copies: Path

    def keep_copies(self) -> None:
        """From now on, put a copy of each file aside once the hook has reported it archived."""
        command = f"{self.hooks / 'wal-archive.sh'} %p %f && cp %p {shlex.quote(str(self.copies))}/%f"
        self.cluster.execute(f"ALTER SYSTEM SET archive_command = '{command}'", "SELECT pg_reload_conf()")


class MakeStack(Protocol):
    """Makes a stack for one test; all of it is ended after the test."""

    def __call__(
        self,
        *,
        name: str = "pg",
        major: int = 18,
        repository: Mapping[str, str],
        settings: Mapping[str, str] | None = None,
        wal_volume: SmallVolume | None = None,
        segment_megabytes: int = 1,
        first_segment: str = "",
    ) -> Stack:
        """Return a running stack on `repository`, with more `settings` of the agent, its pg_wal on `wal_volume`.

        Its WAL begins with `first_segment`, if that is given.
        """


@pytest.fixture
def make_stack(
    lab_directory: Path, make_cluster: MakeCluster, make_agent: MakeAgent, hook_directory: Path
) -> MakeStack:
    """Makes stacks; see `MakeStack`. PostgreSQL 18, because its package has pgbench; segments of 1 MiB."""

    def make(
        *,
        name: str = "pg",
        major: int = 18,
        repository: Mapping[str, str],
        settings: Mapping[str, str] | None = None,
        wal_volume: SmallVolume | None = None,
        segment_megabytes: int = 1,
        first_segment: str = "",
    ) -> Stack:
        socket = lab_directory / f"{name}-agent" / "agent.sock"
        cluster = make_cluster(
            major,
            name=name,
            segment_megabytes=segment_megabytes,
            fresh=name != "pg",
            environment={"PITR_SOCKET": str(socket)},
            archive_mode="on",
            archive_command=f"{hook_directory / 'wal-archive.sh'} %p %f",
            restore_command=f"{hook_directory / 'wal-restore.sh'} %f %p",
        )
        if first_segment:
            cluster.run("pg_resetwal", "--next-wal-file", first_segment, str(cluster.data_directory))
        if wal_volume is not None:
            wal_volume.move_wal_here(cluster)
        agent = make_agent({**repository, **cluster.client_environment, **(settings or {})}, name=f"{name}-agent")
        copies = lab_directory / f"{name}-copies"
        make_directory(copies)
        hand_over(copies)
        agent.start()
        cluster.start()
        return Stack(cluster, agent, hook_directory, repository, copies)

    return make


@pytest.fixture
def s3_server_of_its_own(lab_directory: Path) -> Iterator[SeaweedServer]:
    """An S3 server that the test may stop and start."""
    with SeaweedServer(lab_directory / "s3") as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def stack(make_stack: MakeStack, s3_server_of_its_own: SeaweedServer) -> Stack:
    """A running stack on an S3 server of its own."""
    return make_stack(repository=s3_server_of_its_own.environment(BUCKET, f"test-{uuid.uuid4().hex[:8]}"))
