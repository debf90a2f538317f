"""The `pitr` command: one command to one exit code."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from agent.cli.loading import group_of
from agent.cli.terminal import print_error
from agent.errors import AgentAnswer, AgentError, library_missing

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Point-in-time recovery for PostgreSQL. Settings come from the environment: docs/settings.md.",
    cls=group_of(
        {
            "agent": "agent.cli.agent:agent_command",
            "backup": "agent.cli.backup:commands",
            "wal": "agent.cli.wal:commands",
            "status": "agent.cli.status:status_command",
            "restore": "agent.cli.restore:restore_command",
            "drill": "agent.cli.drill:drill_command",
            "window": "agent.cli.window:window_command",
            "expire": "agent.cli.expire:expire_command",
            "verify": "agent.cli.verify:verify_command",
            "check": "agent.cli.check:check_command",
            "demo": "agent.cli.demo:demo",
        }
    ),
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
    except ImportError as error:
        missing = library_missing(error)
        print_error(missing)
        sys.exit(missing.exit_code)
