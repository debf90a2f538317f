"""The real agent and the real `pitr` command as processes of their own, for the demo and the tests."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import agent
from agent.errors import AgentUnavailable
from agent.lab.privileges import make_directory, unprivileged
from agent.lab.processes import kill_tree
from agent.lab.seaweedfs import free_ports
from agent.lab.waiting import wait_until

_OURS = ("PITR_", "TARGET_", "WALG_", "AWS_", "PG")
_OURS_WHOLE = ("BACKUP_NAME", "AUTO_START")
_LOG_TAIL_LINES = 15


def agent_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `settings` for the agent's; none of those it has are inherited.

    Python finds this package from any directory, be it installed or not.
    """
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(_OURS) and name not in _OURS_WHOLE}
    return {**inherited, "PYTHONPATH": str(Path(agent.__file__).parents[1]), **settings}


def pitr_command(*arguments: str) -> list[str]:
    """Return the command line that runs `pitr` with `arguments`, as whom PostgreSQL runs as, in `agent_environment`."""
    return unprivileged([sys.executable, "-P", "-m", "agent", *arguments])


def run_pitr(*arguments: str, settings: Mapping[str, str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `pitr` with `arguments` to its end; return its exit code, standard output and standard error.

    Raises:
        subprocess.TimeoutExpired: It ran longer than `seconds`; it and all it started are killed.
    """
    command = pitr_command(*arguments)
    with subprocess.Popen(
        command,
        env=agent_environment(settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, complained = process.communicate(timeout=seconds)
        finally:
            kill_tree(process)
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


class AgentProcess:
    """`pitr agent` as a process with its socket (`agent.sock`) and its log (`agent.log`) in `directory`.

    The settings are `settings`, and a socket and a free HTTP port unless they name them. The methods block. As a
    context manager it kills an agent that still runs.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.settings = {
            "PITR_SOCKET": str(directory / "agent.sock"),
            "PITR_HTTP_LISTEN": f"127.0.0.1:{free_ports(1)[0]}",
            **settings,
        }
        self.log_file = directory / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def socket(self) -> Path:
        """The unix socket that the hooks and `pitr` speak to."""
        return Path(self.settings["PITR_SOCKET"])

    @property
    def url(self) -> str:
        """Address of metrics and health."""
        return f"http://{self.settings['PITR_HTTP_LISTEN']}"

    @property
    def pid(self) -> int | None:
        """The agent's process id, or None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, *, seconds: float = 120, wait: bool = True) -> None:
        """Start the agent; return when its socket is served and it reports to be ready (without `wait`: at once).

        Raises:
            AgentUnavailable: It ended, or was not ready within `seconds`; the message has the end of its log.
        """
        assert self.pid is None, "the agent runs"
        make_directory(self.directory)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                pitr_command("agent"),
                cwd=self.directory,
                env=agent_environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for us, we stop the agent in order
            )
        if wait:
            self.wait_until_ready(seconds=seconds)

    def wait_until_ready(self, *, seconds: float = 120) -> None:
        """Return when the socket is served and the agent reports to be ready; errors as of `start`."""
        try:
            wait_until(lambda: self.pid is None or self.is_ready(), seconds=seconds, what="the agent to be ready")
        except TimeoutError as error:
            self.kill()
            raise AgentUnavailable(f"{error}:\n{self.log_tail()}") from error
        if self.pid is None:
            raise AgentUnavailable(f"the agent did not start:\n{self.log_tail()}")

    def is_ready(self) -> bool:
        """Tell whether the socket is served and `/healthz` and `/readyz` say yes."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
            return all(self.get(path)[0] == 200 for path in ("/healthz", "/readyz"))
        return False

    def get(self, path: str) -> tuple[int, str]:
        """Get `path` from the agent's HTTP port; return status and body. Raises OSError if nothing answers."""
        connection = http.client.HTTPConnection(self.settings["PITR_HTTP_LISTEN"], timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def metric(self, name: str) -> float:
        """Return the sample `name` (with its labels, as `/metrics` writes it), 0.0 if there is none."""
        samples = (line.rpartition(" ") for line in self.get("/metrics")[1].splitlines())
        return next((float(value) for sample, _, value in samples if sample == name), 0.0)

    def signal(self, number: int) -> None:
        """Send a signal to a running agent."""
        assert self.pid is not None, "the agent does not run"
        os.kill(self.pid, number)

    def wait(self, *, seconds: float = 60) -> int:
        """Return the exit code of an agent that ends by itself, or was asked to.

        Raises:
            AgentUnavailable: It still runs after `seconds`; then it is killed.
        """
        assert self._process is not None, "the agent was never started"
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AgentUnavailable(f"the agent still ran after {seconds:g} s:\n{self.log_tail()}") from error

    def stop(self, *, seconds: float = 60) -> int | None:
        """Ask the agent to end at once (by asking twice) and return its exit code; None if it did not run."""
        if self.pid is None:
            return None
        for number in (signal.SIGTERM, signal.SIGINT):  # two of one number may arrive as one
            if self.pid is not None:
                self.signal(number)
        return self.wait(seconds=seconds)

    def kill(self) -> None:
        """End the agent, and PostgreSQL if it started one, by SIGKILL; return when they are gone."""
        if self._process is not None:
            kill_tree(self._process)

    def restart(self) -> None:
        """Stop the agent and start it."""
        self.stop()
        self.start()

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """Yield what the agent has logged, oldest first; lines that are not JSON as `{"event": LINE}`."""
        for line in self.log_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"event": line}

    def log_text(self) -> str:
        """Return all that the agent has written, "" before its first start."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_tail(self) -> str:
        """Return the last lines of the agent's log."""
        return "\n".join(self.log_text().splitlines()[-_LOG_TAIL_LINES:])
