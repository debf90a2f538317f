"""What is not loaded where it is not needed: libraries of some to tens of MiB, and tenths of a second."""

import subprocess
import sys

import pytest

ARCHIVING = "agent.cli.main, agent.cli.agent, agent.app, agent.storage.s3"
READING = "agent.cli.main, agent.cli.window, agent.cli.wal, agent.cli.expire, agent.cli.verify"
ASKING = "agent.cli.main, agent.cli.backup, agent.cli.backup_now, agent.cli.status"


@pytest.mark.parametrize(
    ("modules", "not_needed"),
    [
        (ARCHIVING, ["numpy", "psycopg", "boto3", "agent.lab", "agent.check", "agent.restore_mode"]),
        (
            READING,
            ["agent.app", "agent.server", "agent.archive", "agent.backup", "agent.restore", "aiohttp", "botocore"],
        ),
        (ASKING, ["agent.app", "agent.repository", "agent.storage", "aiohttp.web", "structlog"]),
    ],
    ids=["the resident agent", "what reads a directory", "what asks it something"],
)
def test_what_something_else_needs_is_not_loaded(modules: str, not_needed: list[str]) -> None:
    program = f"import {modules}, sys; print([name for name in {not_needed} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
