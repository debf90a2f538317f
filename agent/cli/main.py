"""The `pitr` command: one command to one exit code."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer
import uvloop

from agent.app import run_archive_mode
from agent.cli import backup, wal
from agent.cli.check import check_command
from agent.cli.control import AgentAnswer
from agent.cli.demo import demo
from agent.cli.drill import drill_command
from agent.cli.expire import expire_command
from agent.cli.restore import restore_command
from agent.cli.status import status_command
from agent.cli.terminal import print_error
from agent.cli.verify import verify_command
from agent.cli.window import window_command
from agent.errors import AgentError
from agent.restore_mode import restore
from agent.settings import Mode, load_settings
from agent.telemetry.logging import configure_logging

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Point-in-time recovery for PostgreSQL. Settings come from the environment: docs/settings.md.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"pitr {version('postgres-pitr')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


app.add_typer(backup.commands, name="backup")
app.add_typer(wal.commands, name="wal")
app.command("status")(status_command)
app.command("restore")(restore_command)
app.command("drill")(drill_command)
app.command("window")(window_command)
app.command("expire")(expire_command)
app.command("verify")(verify_command)
app.command("check")(check_command)
app.command("demo")(demo)


@app.command()
def agent() -> None:
    """Run the agent: PITR_MODE=archive (default) serves a primary, PITR_MODE=restore restores and ends."""
    settings = load_settings()
    configure_logging(settings.log_level)
    if settings.mode is Mode.RESTORE:
        uvloop.run(restore(settings, lambda _progress: None, http=True))
    else:
        uvloop.run(run_archive_mode(settings))


def main() -> None:
    """Run the `pitr` command; exit with the code that docs/settings.md lists."""
    try:
        app()
    except AgentAnswer as error:
        print_error(error)
        sys.exit(error.told_exit_code)
    except AgentError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
