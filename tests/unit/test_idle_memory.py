"""What an agent that only archives does not load: libraries of tens of MiB that serve base backups."""

import subprocess
import sys

BIG = ("numpy", "psycopg", "agent.lab")


def test_the_agent_starts_without_the_large_libraries_of_base_backups() -> None:
    program = f"import agent.cli.main, sys; print([name for name in {BIG} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
