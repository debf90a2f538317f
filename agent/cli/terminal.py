"""How the `pitr` command speaks: tables for people, JSON for programs, one line for an error."""

import json
import sys
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from agent.domain.restore_target import format_time
from agent.errors import AgentError

Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys.")]

_PIPE_COLUMNS = 200  # what reads a pipe has no screen to fit
out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON; aware datetimes become RFC 3339 UTC."""

    def encode(item: object) -> str:
        if isinstance(item, datetime):
            return format_time(item)
        raise TypeError(f"{type(item).__name__} has no JSON form")

    print(json.dumps(value, indent=2, default=encode))


def print_error(error: AgentError) -> None:
    """Print what is wrong and what to do, a line for each problem, on standard error."""
    for line in error.lines():
        print(f"pitr: {line}", file=sys.stderr)


def size_text(size: int) -> str:
    """Write a size for people: `4.3 MiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """Write a duration for people: `3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
