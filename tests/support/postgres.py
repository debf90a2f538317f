"""Fixtures: throw-away PostgreSQL servers of every supported major version."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeAlias

import pytest

from agent.errors import ConfigError
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import PostgresBinaries, find_binaries
from agent.lab.privileges import hand_over, make_temporary_directory
from agent.lab.processes import kill_all_in

CACHE = Path(__file__).parents[2] / ".cache" / "postgres"
WORKHORSE = 15
_SETTINGS: Mapping[str, str | int | bool] = {
    "fsync": False,  # tests kill processes, not machines
    "checkpoint_completion_target": 0,  # scheduled base backups begin with a checkpoint that takes its time
    "shared_buffers": "16MB",
    "max_connections": 20,
    "wal_level": "replica",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

FindBinaries: TypeAlias = Callable[[int], PostgresBinaries]


class MakeCluster(Protocol):
    """Makes a database cluster for one test; it is not started, and removed with all its processes after the test."""

    def __call__(
        self,
        major: int = WORKHORSE,
        *,
        name: str = "pg",
        segment_megabytes: int = 1,
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
        **settings: str | int | bool,
    ) -> PostgresCluster:
        """Return the cluster `name` with `settings` in its postgresql.conf.

        Clusters of one major version and segment size are copies of each other, down to the system identifier, unless
        they are made `fresh`.
        """


def copy_if_there(source: str, destination: str) -> str:
    """Copy one file for `shutil.copytree`, unless the running server has removed it since it was listed."""
    with suppress(FileNotFoundError):
        shutil.copy2(source, destination, follow_symlinks=False)
    return destination


def pytest_configure() -> None:
    """Let a pytest that is told to end (SIGTERM, as by `timeout`) tear its tests down, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture
def lab_directory() -> Iterator[Path]:
    """An empty directory with a short path, owned by whom PostgreSQL and the agent run as, for one test.

    What still runs in it after the test is killed.
    """
    directory = make_temporary_directory("pitr-test-")
    yield directory
    kill_all_in(directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgres_binaries() -> FindBinaries:
    """Finds the programs of a major version; skips the test if they cannot be had.

    With PITR_TEST_REQUIRE_POSTGRES=1, as in CI, it fails the test instead.
    """

    def find(major: int) -> PostgresBinaries:
        try:
            return find_binaries(major, CACHE)
        except ConfigError as error:
            if os.environ.get("PITR_TEST_REQUIRE_POSTGRES") == "1":
                raise
            pytest.skip(error.one_line())

    return find


@pytest.fixture(scope="session")
def template_directory() -> Iterator[Path]:
    """Where the session keeps one initialised cluster per major version and segment size, to copy from."""
    directory = make_temporary_directory("pitr-templates-")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def make_cluster(
    lab_directory: Path, template_directory: Path, postgres_binaries: FindBinaries
) -> Iterator[MakeCluster]:
    """Makes PostgreSQL clusters in `lab_directory`; see `MakeCluster`."""
    made: list[PostgresCluster] = []

    def make(
        major: int = WORKHORSE,
        *,
        name: str = "pg",
        segment_megabytes: int = 1,
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
        **settings: str | int | bool,
    ) -> PostgresCluster:
        cluster = PostgresCluster(lab_directory / name, postgres_binaries(major), environment=environment)
        made.append(cluster)
        if fresh:
            cluster.initdb(segment_megabytes=segment_megabytes)
        else:
            template = PostgresCluster(template_directory / f"{major}-{segment_megabytes}", cluster.binaries)
            if not template.data_directory.exists():
                template.initdb(segment_megabytes=segment_megabytes)
            shutil.copytree(template.data_directory, cluster.data_directory, symlinks=True)
            hand_over(cluster.data_directory)
        cluster.configure(**{**_SETTINGS, **settings})
        return cluster

    yield make
    for cluster in made:
        cluster.kill()
