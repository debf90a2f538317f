"""`pitr drill`: prove that a restore works, and how long it takes."""

import sys
from typing import Annotated, Any

import typer
import uvloop

from agent.cli.progress_bar import ProgressBar
from agent.cli.restore import checks_text, outcome_json
from agent.cli.terminal import Json, err, out, print_json, seconds_text
from agent.domain.restore_target import format_time
from agent.restore.drill import DrillOutcome
from agent.restore_mode import drill
from agent.settings import load_settings
from agent.telemetry.logging import configure_logging

Seed = Annotated[int | None, typer.Option("--seed", help="Choose the moment by this number instead of at random.")]


def drill_command(seed: Seed = None, as_json: Json = False) -> None:
    """Restore the newest base backup to a moment at random into an empty PGDATA, check it, and remove it."""
    settings = load_settings()
    settings.require_data_directory()
    configure_logging("warning" if err.is_terminal else settings.log_level, sys.stderr)
    with ProgressBar("planning") as bar:
        outcome = uvloop.run(drill(settings, bar.report, seed=seed))
    if as_json:
        print_json(drill_json(outcome))
    else:
        out.print(drill_text(outcome))


def drill_json(outcome: DrillOutcome) -> dict[str, Any]:
    """Return the JSON form of what a drill proved; `restored` is as of `pitr restore --json`."""
    return {
        "ok": True,
        "moment": outcome.moment,
        "seconds": outcome.seconds,
        "restored": outcome_json(outcome.restored),
    }


def drill_text(outcome: DrillOutcome) -> str:
    """Return what a drill proved, for people."""
    restored = outcome.restored
    last = format_time(restored.last_commit_at) if restored.last_commit_at else "none"
    return (
        f"{format_time(outcome.moment)} can be restored: {restored.backup} and its WAL gave a server in "
        f"{seconds_text(outcome.seconds)}; last transaction {last}; {checks_text(restored.checks)}"
    )
