"""Fixtures for all tests live in tests/support, one module a subject."""

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.agent_process",
    "tests.support.hooks",
    "tests.support.stack",
    "tests.support.s3",
]
