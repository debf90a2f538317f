"""`pitr backup now` and `pitr backup cancel`: a base backup through the running agent, followed to its end."""

import time
from typing import Annotated, Any

import typer
import uvloop
from rich.live import Live
from rich.text import Text

from agent.cli.control import ask, post_lines
from agent.cli.status import progress_text
from agent.cli.terminal import INTERRUPTED, Json, err, out, print_json, seconds_text, size_text
from agent.errors import AgentUnavailable
from agent.server.control_paths import BACKUPS_PATH, CANCEL_PATH
from agent.settings import Settings, load_settings

LINE_SECONDS = 15.0  # between lines where there is no terminal

Full = Annotated[bool, typer.Option("--full", help="All of it, whatever the rule of delta chains says.")]
Delta = Annotated[bool, typer.Option("--delta", help="Only what changed since the newest base backup.")]
Permanent = Annotated[bool, typer.Option("--permanent", help="Pin it: expiry never removes it.")]


def backup_now(full: Full = False, delta: Delta = False, permanent: Permanent = False, as_json: Json = False) -> None:
    """Take a base backup through the running agent, or join the one that runs. Ctrl-C leaves it running."""
    if full and delta:
        raise typer.BadParameter("--full and --delta exclude each other")
    parameters = {"permanent": "true"} if permanent else {}
    if full or delta:
        parameters["kind"] = "full" if full else "delta"
    try:
        last = uvloop.run(_follow(load_settings(), parameters))
    except KeyboardInterrupt:
        err.print("The base backup goes on in the agent. To see it: pitr backup list; to end it: pitr backup cancel")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(last)
    else:
        out.print(
            f"base backup [bold]{last['backup']}[/bold] ({last['kind']}) finished in {seconds_text(last['seconds'])}: "
            f"{size_text(last['size_bytes'])}, stored as {size_text(last['stored_bytes'])}"
        )
        if last["corrupt_pages"]:
            out.print(f"[red]corrupt pages in the database: {last['corrupt_pages']}[/red]; the agent's log names them")


def cancel_backup(as_json: Json = False) -> None:
    """Cancel the base backup that runs; nothing of it is left when this returns."""
    answer = uvloop.run(ask(load_settings().socket, CANCEL_PATH, method="POST"))
    if as_json:
        print_json(answer)
    else:
        out.print("The base backup was cancelled." if answer["cancelled"] else "No base backup is running.")


class _Teller:
    """Shows progress: one line that changes on a terminal, now and then a line elsewhere."""

    def __init__(self, live: Live | None) -> None:
        self._live = live
        self._stage = ""
        self._told_at = 0.0

    def tell(self, running: dict[str, Any]) -> None:
        """Show how far it is."""
        if self._live is not None:
            self._live.update(Text(progress_text(running), no_wrap=True, overflow="ellipsis"))
        elif running["stage"] != self._stage or time.monotonic() - self._told_at >= LINE_SECONDS:
            self._stage, self._told_at = running["stage"], time.monotonic()
            err.print(progress_text(running))


async def _follow(settings: Settings, parameters: dict[str, str]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    live = Live(console=err, transient=True) if err.is_terminal else None
    teller = _Teller(live)
    if live is not None:
        live.start()
    try:
        async for last in post_lines(settings.socket, BACKUPS_PATH, parameters):
            if last.get("joined"):
                err.print(f"A base backup is already running ({last['why']}); this follows it.")
            elif "stage" in last:
                teller.tell(last)
    finally:
        if live is not None:
            live.stop()
    if "backup" not in last:
        raise AgentUnavailable(
            "the agent ended before the backup was complete", hint="Nothing of it is listed; take another one."
        )
    return last
