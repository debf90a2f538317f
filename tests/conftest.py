"""Fixtures for all tests live in tests/support, one module a subject."""

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest
from hypothesis import settings

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.agent_process",
    "tests.support.hooks",
    "tests.support.log_stream",
    "tests.support.small_volume",
    "tests.support.stack",
    "tests.support.s3",
]

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("pitr", deadline=None)
settings.load_profile("pitr")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests that go by chance run for as long as one likes."""
    parser.addoption(
        "--fault-rounds", type=int, default=1, help="how often the schedule of faults is run through (default 1)"
    )
    parser.addoption(
        "--restore-rounds", type=int, default=2, help="how often a cluster lives, is restored, and branches (default 2)"
    )
    parser.addoption("--restore-seed", type=int, default=None, help="repeat the choices of a run that printed this")
    parser.addoption("--restore-major", type=int, default=18, help="PostgreSQL's major version (default 18)")


def pytest_collection_finish() -> None:
    """Keep what all tests share, a few hundred MiB of modules and examples, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
async def no_connection_outlives_its_loop() -> AsyncIterator[None]:
    """End what was closed with something unsent: it waits for its peer, and is found unclosed by a later test."""
    yield
    transports = list(vars(asyncio.get_running_loop())["_transports"].values())
    for transport in transports:
        if transport.is_closing() and transport.get_write_buffer_size():
            transport.abort()
    await asyncio.sleep(0)
