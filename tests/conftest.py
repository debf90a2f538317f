"""Fixtures for all tests live in tests/support, one module a subject."""

import pytest
from hypothesis import settings

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.agent_process",
    "tests.support.hooks",
    "tests.support.small_volume",
    "tests.support.stack",
    "tests.support.s3",
]

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("pitr", deadline=None)
settings.load_profile("pitr")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests with faults run for as long as one likes."""
    parser.addoption(
        "--fault-rounds", type=int, default=1, help="how often the schedule of faults is run through (default 1)"
    )
