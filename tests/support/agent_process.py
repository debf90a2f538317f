"""Fixtures: the real agent and the real `pitr` command as processes."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from agent.lab.agent_process import AgentProcess, run_pitr


class MakeAgent(Protocol):
    """Makes an agent for one test; it is not started, and killed after the test."""

    def __call__(self, settings: Mapping[str, str], *, name: str = "agent") -> AgentProcess:
        """Return the agent with its socket and its log in the directory `name` of `lab_directory`.

        It takes no base backup unasked, unless `settings` say so.
        """


class RunPitr(Protocol):
    """Runs the `pitr` command to its end."""

    def __call__(
        self, *arguments: str, settings: Mapping[str, str], seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Return its exit code, standard output and standard error."""


@pytest.fixture
def make_agent(lab_directory: Path) -> Iterator[MakeAgent]:
    """Makes agents in `lab_directory`; see `MakeAgent`."""
    made: list[AgentProcess] = []

    def make(settings: Mapping[str, str], *, name: str = "agent") -> AgentProcess:
        made.append(
            AgentProcess(lab_directory / name, {"PITR_BACKUP_SCHEDULE": "", "PITR_VERIFY_SCHEDULE": "", **settings})
        )
        return made[-1]

    yield make
    for agent in made:
        agent.kill()


@pytest.fixture
def pitr() -> RunPitr:
    """Runs `python -m agent` with arguments and settings, as whom PostgreSQL runs as; see `RunPitr`."""
    return run_pitr
