"""How the `pitr` command speaks: tables for people, JSON for programs, one line for an error."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement

from agent.domain.restore_target import format_time
from agent.errors import AgentError
from agent.telemetry.words import seconds_text as seconds_text
from agent.telemetry.words import size_text as size_text

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys.")]

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
PATIENCE_SECONDS = 10.0  # a person waits: tell an unreachable store soon
_ANY_WIDTH = 1000  # columns
_PIPE_COLUMNS = 200  # what reads a pipe has no screen to fit, unless it says how wide
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON; aware datetimes become RFC 3339 UTC."""

    def encode(item: object) -> str:
        if isinstance(item, datetime):
            return format_time(item)
        raise TypeError(f"{type(item).__name__} has no JSON form")

    print(json.dumps(value, indent=2, default=encode))


def print_table(table: "Table", told: Sequence[str]) -> None:
    """Print `table`; where the terminal is too narrow for it, `told`: the same in sentences."""
    fits = Measurement.get(out, out.options.update_width(_ANY_WIDTH), table).maximum <= out.width
    out.print(*([table] if fits else told), sep="\n")


def print_error(error: AgentError) -> None:
    """Print what is wrong and what to do, a line for each problem, on standard error."""
    for line in error.lines():
        print(f"pitr: {line}", file=sys.stderr)
