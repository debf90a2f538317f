"""`pitr backup`: the catalog, and a backup now."""

import time
from typing import Any

import typer
import uvloop
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from agent.app import outside
from agent.cli.control import post_lines
from agent.cli.terminal import Json, err, out, print_json, seconds_text, size_text
from agent.domain.catalog import Backup
from agent.domain.lsn import format_lsn
from agent.errors import AgentUnavailable
from agent.repository.backups import read_catalog
from agent.server.control_api import BACKUPS_PATH
from agent.settings import Settings, load_settings

PATIENCE_SECONDS = 10.0  # a person waits: tell an unreachable store soon

commands = typer.Typer(no_args_is_help=True, help="Take, list and look at base backups.")


def backup_json(backup: Backup) -> dict[str, Any]:
    """Return the keys that `pitr backup list --json` promises."""
    return {
        "name": backup.name,
        "kind": "delta" if backup.is_delta else "full",
        "parent": backup.parent,
        "timeline": backup.timeline,
        "start_time": backup.start_time,
        "finish_time": backup.finish_time,
        "start_lsn": format_lsn(backup.start_lsn),
        "finish_lsn": format_lsn(backup.finish_lsn),
        "pg_version": backup.pg_version,
        "system_identifier": backup.system_identifier,
        "size_bytes": backup.size_bytes,
        "stored_bytes": backup.stored_bytes,
        "permanent": backup.permanent,
    }


@commands.command("list")
def list_backups(as_json: Json = False) -> None:
    """List the base backups of the repository, oldest first."""

    async def read() -> list[Backup]:
        async with outside(load_settings(), retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            return await read_catalog(opened.store)

    backups = uvloop.run(read())
    if as_json:
        print_json([backup_json(backup) for backup in backups])
        return
    if not backups:
        out.print("The repository holds no base backup. Take one: pitr backup now")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True, min_width=max(len(backup.name) for backup in backups))
    for heading in ("kind", "finished (UTC)", "took"):
        table.add_column(heading, no_wrap=True)
    for heading in ("size", "stored"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("finish LSN", no_wrap=True)
    table.add_column("PostgreSQL", no_wrap=True)
    for backup in backups:
        table.add_row(
            backup.name,
            ("delta" if backup.is_delta else "full") + (", pinned" if backup.permanent else ""),
            f"{backup.finish_time:%Y-%m-%d %H:%M:%S}",
            seconds_text((backup.finish_time - backup.start_time).total_seconds()),
            size_text(backup.size_bytes),
            size_text(backup.stored_bytes),
            format_lsn(backup.finish_lsn),
            f"{backup.pg_version // 10000}.{backup.pg_version % 10000}",
        )
    out.print(table)


@commands.command("now")
def backup_now(as_json: Json = False) -> None:
    """Take a full base backup through the running agent."""
    settings = load_settings()
    started = time.monotonic()
    last = uvloop.run(_follow(settings))
    if as_json:
        print_json(last)
    else:
        out.print(
            f"base backup [bold]{last['backup']}[/bold] finished in {seconds_text(time.monotonic() - started)}: "
            f"{size_text(last['size_bytes'])}, stored as {size_text(last['stored_bytes'])}"
        )


async def _follow(settings: Settings) -> dict[str, Any]:
    last: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        async for last in post_lines(settings.socket, BACKUPS_PATH):
            if "stage" in last:
                progress.update(
                    task,
                    description=last["stage"],
                    completed=last["done_bytes"],
                    total=last["total_bytes"] or None,
                )
    if "backup" not in last:
        raise AgentUnavailable(
            "the agent ended before the backup was complete", hint="Nothing of it is listed; take another one."
        )
    return last
