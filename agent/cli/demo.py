"""`pitr demo`: the whole story on this machine."""

from typing import Annotated

import typer
from rich.console import Console

Keep = Annotated[bool, typer.Option("--keep", help="Leave everything running, to look at.")]


def demo(keep: Keep = False) -> None:
    """Show it all on this machine: archive, back up, drop a table, restore to just before, prove it.

    PostgreSQL, an S3 server and the agent run in a temporary directory, which is removed at the end.

    As root it goes on as the user postgres, or nobody: PostgreSQL refuses to run as root.
    """
    from agent.lab.demo import run_demo  # only here: the other commands need none of its libraries
    from agent.lab.demo_stage import required_programs
    from agent.lab.privileges import restart_unprivileged

    restart_unprivileged(needs=required_programs())
    console = Console(highlight=False)
    try:
        run_demo(console, keep=keep)
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing is left of it.")
        raise
