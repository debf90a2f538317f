"""`pitr backup show|pin|unpin|delete NAME`."""

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

import typer
import uvloop

from agent.cli.terminal import PATIENCE_SECONDS, Json, out, print_json, size_text
from agent.domain.catalog import Backup
from agent.domain.drill import DrillRecord
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import format_time
from agent.domain.verification_order import VerificationRecord
from agent.expire.by_name import delete, find_backup, pin, unpin
from agent.outside import Outside, outside
from agent.repository.backups import read_catalog
from agent.repository.drill_record import read_drill
from agent.repository.keys import backup_folder
from agent.repository.verification_record import read_record
from agent.restore.planner import NEWEST
from agent.settings import load_settings
from agent.telemetry.logging import configure_logging

_T = TypeVar("_T")
Name = Annotated[str, typer.Argument(metavar="NAME", help="As `pitr backup list` shows it.")]
NameOrNewest = Annotated[str, typer.Argument(metavar="NAME", help="As `pitr backup list` shows it, or LATEST.")]
WithDependents = Annotated[bool, typer.Option("--with-dependents", help="Delete all that build on it, too.")]


def _run(work: Callable[[Outside], Awaitable[_T]]) -> _T:
    configure_logging("error", sys.stderr)

    async def run() -> _T:
        async with outside(load_settings(), retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            return await work(opened)

    return uvloop.run(run())


def show_backup(name: NameOrNewest, as_json: Json = False) -> None:
    """Show one base backup: what it is, what it builds on, what builds on it, and what is stored of it."""

    async def read(opened: Outside) -> tuple[list[Backup], dict[str, Any], list[int]]:
        catalog = await read_catalog(opened.store)
        backup = catalog[-1] if catalog and name == NEWEST else find_backup(catalog, name)
        record, drill = await read_record(opened.store, backup.name), await read_drill(opened.store, backup.name)
        sizes = [info.size async for info in opened.store.list(backup_folder(backup.name))]
        return catalog, backup_json(backup, record, drill), sizes

    catalog, shown, sizes = _run(read)
    children = [each.name for each in catalog if each.parent == shown["name"]]
    shown |= {"children": children, "objects": len(sizes), "objects_bytes": sum(sizes)}
    if as_json:
        print_json(shown)
        return
    for key, value in shown.items():
        text = format_time(value) if isinstance(value, datetime) else value
        text = ("yes" if value else "no") if isinstance(value, bool) else text
        text = f"{value // 10_000}.{value % 10_000}" if key == "pg_version" else text
        text = size_text(value) if key.endswith("_bytes") else text
        text = ", ".join(value) or "none" if isinstance(value, list) else text
        out.print(f"{key.replace('_', ' '):18} {'none' if text is None else text}", markup=False)


def pin_backup(name: Name, as_json: Json = False) -> None:
    """Keep a base backup, and what it builds on, until it is unpinned; of WAL what makes it consistent."""
    _print_changed("pinned", _run(lambda opened: pin(opened.store, name)), name, as_json=as_json)


def unpin_backup(name: Name, as_json: Json = False) -> None:
    """Let retention decide again about a base backup; what it builds on stays pinned."""
    _print_changed("unpinned", _run(lambda opened: unpin(opened.store, name)), name, as_json=as_json)


def _print_changed(what: str, changed: list[str], name: str, *, as_json: bool) -> None:
    if as_json:
        print_json({what: changed})
        return
    for each in changed or [name]:
        out.print(f"{each} {what if changed else f'was {what} already'}")


def delete_backup(name: Name, with_dependents: WithDependents = False, as_json: Json = False) -> None:
    """Delete a base backup now. Its WAL goes with the next `pitr expire`, as far as nothing else needs it."""
    gone, removal = _run(
        lambda opened: delete(opened.store, opened.archive, opened.clock, name, with_dependents=with_dependents)
    )
    if as_json:
        failed = [{"key": key, "reason": error.message} for key, error in removal.failed.items()]
        print_json({"deleted": gone, "bytes": removal.backups.stored_bytes, "failed": failed})
    else:
        for each in gone:
            out.print(f"{each} deleted")
    removal.raise_if_incomplete()


def backup_json(backup: Backup, record: VerificationRecord, drill: DrillRecord) -> dict[str, Any]:
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
        "corrupt_pages": backup.corrupt_pages,
        "verified_at": record.verified_at,
        "problems": list(record.known_problems),
        "drilled_at": drill.succeeded_at,
        "drilled_to": drill.moment,
        "drill_seconds": None if drill.milliseconds is None else drill.milliseconds / 1000,
        "drill_failed_at": drill.failed_at,
        "drill_exit_code": drill.exit_code,
    }
