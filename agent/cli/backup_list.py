"""`pitr backup list`."""

import sys
from collections.abc import Mapping

import uvloop
from rich.table import Table

from agent.cli.backup_by_name import backup_json
from agent.cli.status import print_agents_word
from agent.cli.terminal import PATIENCE_SECONDS, Json, out, print_json, print_table, seconds_text, size_text
from agent.domain.catalog import Backup
from agent.domain.drill import DrillRecord
from agent.domain.verification_order import VerificationRecord
from agent.outside import outside
from agent.repository.backups import read_catalog
from agent.repository.drill_record import read_drills
from agent.repository.verification_record import read_records
from agent.settings import load_settings
from agent.telemetry.logging import configure_logging


def list_backups(as_json: Json = False) -> None:
    """List the base backups of the repository, oldest first."""

    settings = load_settings()
    configure_logging("error", sys.stderr)

    async def read() -> tuple[list[Backup], dict[str, VerificationRecord], dict[str, DrillRecord]]:
        async with outside(settings, retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            backups = await read_catalog(opened.store)
            names = [backup.name for backup in backups]
            return backups, await read_records(opened.store, names), await read_drills(opened.store, names)

    backups, records, drills = uvloop.run(read())
    if as_json:
        print_json([backup_json(backup, records[backup.name], drills[backup.name]) for backup in backups])
        return
    if backups:
        _print_catalog(backups, records, drills)
    else:
        out.print("The repository holds no base backup. Take one: pitr backup now")
    print_agents_word(settings, {backup.name for backup in backups})


def _print_catalog(
    backups: list[Backup], records: Mapping[str, VerificationRecord], drills: Mapping[str, DrillRecord]
) -> None:
    """Print a table; where the terminal is too narrow for it, a name and a sentence for each base backup."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "kind", "finished (UTC)", "took", "size", "stored", "verified", "drilled"):
        table.add_column(heading, justify="right" if heading in {"size", "stored"} else "left", no_wrap=True)
    told = []
    for backup in backups:
        cells = (
            _kind_text(backup),
            f"{backup.finish_time:%Y-%m-%d %H:%M:%S}",
            seconds_text((backup.finish_time - backup.start_time).total_seconds()),
            size_text(backup.size_bytes),
            size_text(backup.stored_bytes),
            _verified_text(records[backup.name]),
            _drilled_text(drills[backup.name]),
        )
        table.add_row(backup.name, *cells)
        kind, finished, took, size, stored, verified, drilled = cells
        proofs = [f"{what} {word}" for what, word in (("verified", verified), ("drill", drilled)) if word]
        told.append(
            f"{backup.name}\n  " + ", ".join([kind, f"{finished} UTC in {took}", size, f"{stored} stored", *proofs])
        )
    print_table(table, told)


def _kind_text(backup: Backup) -> str:
    words = ["delta" if backup.is_delta else "full"]
    words += ["pinned"] if backup.permanent else []
    words += [f"[red]{backup.corrupt_pages} corrupt pages[/red]"] if backup.corrupt_pages else []
    return ", ".join(words)


def _verified_text(record: VerificationRecord) -> str:
    if record.known_problems:
        return "[red]damaged[/red]"
    return "" if record.verified_at is None else f"{record.verified_at:%Y-%m-%d}"


def _drilled_text(drill: DrillRecord) -> str:
    if drill.failed_at is not None and (drill.succeeded_at is None or drill.succeeded_at < drill.failed_at):
        return "[red]failed[/red]"
    return "" if drill.succeeded_at is None else f"{drill.succeeded_at:%Y-%m-%d}"
