"""Calling the hook as PostgreSQL does: in the data directory."""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from agent.domain.wal import wal_file_kind
from hooks.hatch_build import PROGRAM

HOOK_SECONDS = 60


@dataclass(frozen=True)
class Hook:
    """The hook installed in `directory`, called in `data_directory`, told to ask at `socket_path`."""

    directory: Path
    data_directory: Path
    socket_path: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """Path of the compiled hook."""
        return str(self.directory / PROGRAM)

    @property
    def environment(self) -> dict[str, str]:
        """The variables it is called with."""
        return {"PATH": os.environ["PATH"], "PITR_SOCKET": str(self.socket_path), **self.variables}

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start `command` as PostgreSQL would, with its stderr piped."""
        return subprocess.Popen(
            command, cwd=self.data_directory, env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the hook to its end."""
        return finish(self.start(self.program, *arguments))

    def archive(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Call it as archive_command does, with a file to archive."""
        self.place(name)
        return self.run("archive", f"pg_wal/{name}", name, *options)

    def place(self, name: str) -> Path:
        """Put a WAL file of this name into pg_wal, if it is a WAL file's name."""
        path = self.data_directory / "pg_wal" / name
        if wal_file_kind(name) is not None:
            path.touch()
        return path

    def restore(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Call it as restore_command does."""
        return self.run("restore", name, "pg_wal/RECOVERYXLOG", *options)

    @property
    def destination(self) -> Path:
        """Where `restore` puts the file."""
        return self.data_directory / "pg_wal" / "RECOVERYXLOG"

    def wal_directory(self) -> list[str]:
        """List pg_wal, but for the WAL files to be archived: what a restore has left there."""
        names = (path.name for path in self.destination.parent.iterdir())
        return sorted(name for name in names if wal_file_kind(name) is None)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of `process`."""
    with process:
        _, stderr = process.communicate(timeout=HOOK_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, "", stderr)


def without_seconds(said: str) -> str:
    """Return what the hook said with an N for the seconds it waited, fewer than the 30 of its default.

    How many more than it was told to says how busy the machine is.
    """
    return re.sub(r"\(waited [12]?\d s\)", "(waited N s)", said)


def is_waiting(process: subprocess.Popen[str]) -> bool:
    """Tell whether a process sleeps in a system call. Source: proc(5), field 3 of /proc/pid/stat."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
