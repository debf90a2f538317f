"""`pitr expire`: what retention keeps and removes, and why; with --confirm it removes."""

import sys
from datetime import datetime
from typing import Annotated, Any

import typer
import uvloop
from rich.table import Table

from agent.cli.terminal import Json, err, out, print_json, print_table, size_text
from agent.domain.retention import RetentionPolicy, Verdict, parse_retention
from agent.errors import ConfigError
from agent.expire.expiry import Expiry, ExpiryPlan
from agent.expire.removal import Removal
from agent.outside import outside
from agent.settings import Settings, load_settings
from agent.telemetry.logging import configure_logging

PATIENCE_SECONDS = 60.0

Policy = Annotated[str, typer.Option("--retention", help="14d, full=3 or 14d,full=3; default PITR_RETENTION.")]
Confirm = Annotated[bool, typer.Option("--confirm", help="Remove what goes; without it nothing is changed.")]


def expire_command(retention: Policy = "", confirm: Confirm = False, as_json: Json = False) -> None:
    """Say which base backups and how much WAL go, why, and what can be restored afterwards; --confirm removes."""
    settings = load_settings()
    policy = parse_retention("--retention", retention) if retention else settings.retention
    if policy is None:
        raise ConfigError("no retention is set", hint="Give --retention 14d, full=3 or both, or set PITR_RETENTION.")
    configure_logging("warning" if err.is_terminal else settings.log_level, sys.stderr)
    plan, removal = uvloop.run(_expire(settings, policy, confirm=confirm))
    if as_json:
        print_json(expiry_json(plan, removal))
    else:
        _print(plan, removal)
    if removal is not None:
        removal.raise_if_incomplete()


async def _expire(settings: Settings, policy: RetentionPolicy, *, confirm: bool) -> tuple[ExpiryPlan, Removal | None]:
    async with outside(settings, retry_seconds=PATIENCE_SECONDS) as opened:
        await opened.store.check()
        expiry = Expiry(opened.store, opened.archive, opened.clock, opened.metrics)
        return await expiry.expire(policy) if confirm else (await expiry.plan(policy), None)


def expiry_json(plan: ExpiryPlan, removal: Removal | None) -> dict[str, Any]:
    """Return the keys of `pitr expire --json`; `removed` is null unless it was confirmed."""
    return {
        "retention": str(plan.policy),
        "backups": [_verdict_json(plan, verdict) for verdict in plan.verdicts],
        "incomplete_backups": [
            {"name": name, "stays": name not in plan.survey.leftovers}
            for name in sorted([*plan.survey.leftovers, *plan.survey.inventory.unfinished])
        ],
        "wal": {"objects": plan.wal.objects, "bytes": plan.wal.stored_bytes},
        "removes_bytes": plan.total.stored_bytes,
        "window": {"before": plan.window_before, "after": plan.window_after},
        "removed": None
        if removal is None
        else {
            "backup_bytes": removal.backups.stored_bytes,
            "wal_objects": removal.wal.objects,
            "wal_bytes": removal.wal.stored_bytes,
            "bucket_keeps_versions": removal.keeps_versions,
            "failed": [{"key": key, "reason": error.message} for key, error in removal.failed.items()],
        },
    }


def _verdict_json(plan: ExpiryPlan, verdict: Verdict) -> dict[str, Any]:
    folder = plan.survey.folders.get(verdict.backup.name)
    return {
        "name": verdict.backup.name,
        "stays": verdict.stays,
        "reason": verdict.reason,
        "finish_time": verdict.backup.finish_time,
        "stored_bytes": folder.stored_bytes if folder else 0,
    }


def _print(plan: ExpiryPlan, removal: Removal | None) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("base backup", "finished (UTC)", "", "stored", "why"):
        table.add_column(heading, justify="right" if heading == "stored" else "left", no_wrap=True)
    told = []
    for verdict in plan.verdicts:
        folder = plan.survey.folders.get(verdict.backup.name)
        name, finished = verdict.backup.name, f"{verdict.backup.finish_time:%Y-%m-%d %H:%M:%S}"
        what = "[green]stays[/green]" if verdict.stays else "[red]goes[/red]"
        size = size_text(folder.stored_bytes if folder else 0)
        table.add_row(name, finished, what, size, verdict.reason)
        told.append(f"{name} {what}: {verdict.reason}\n  finished {finished} UTC, {size} stored")
    print_table(table, told)
    for name in plan.survey.leftovers:
        out.print(f"{name} has no sentinel and is no backup: what is left of it goes")
    for name in plan.survey.inventory.unfinished:
        out.print(f"{name} has no sentinel yet: it stays, it may be in progress")
    if plan.verdicts:
        before, after = (_moment(moment) for moment in (plan.window_before, plan.window_after))
        out.print(f"everything can be restored from {before} on, and after expiry from {after} on")
    else:
        out.print("The repository holds no base backup. Is it the right WALG_S3_PREFIX?")
    if removal is None:
        repeat = "Nothing was removed; repeat with --confirm" if plan.total.objects else "There is nothing to remove"
        out.print(
            f"{size_text(plan.total.stored_bytes)} would go: {len(plan.going)} base backups, {plan.wal.objects} WAL "
            f"files. {repeat}"
        )
        return
    removed = size_text(removal.backups.stored_bytes + removal.wal.stored_bytes)
    out.print(f"removed {removed}, {removal.wal.objects} WAL files among it")
    if removal.keeps_versions:
        out.print("The bucket is versioned: it keeps these bytes as older versions until a lifecycle rule removes them")
    for key, error in removal.failed.items():
        out.print(f"not removed: {key}: {error.message}", markup=False)


def _moment(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment is not None else "no moment"
