"""What an agent that only archives does not load: libraries of some to tens of MiB that serve something else."""

import subprocess
import sys

BIG = ("numpy", "psycopg", "agent.lab", "boto3")


def test_the_agent_starts_without_the_large_libraries_that_archiving_does_not_need() -> None:
    program = f"import agent.cli.main, agent.storage.s3, sys; print([name for name in {BIG} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
