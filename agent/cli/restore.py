"""`pitr restore`: plan, or plan and do it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
import uvloop
from rich.table import Table
from rich.text import Text

from agent.cli.progress_bar import ProgressBar
from agent.cli.terminal import PATIENCE_SECONDS, Json, err, out, print_json, seconds_text, size_text
from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_rates import ASSUMED_REPLAY_RATE, RestoreEstimate, estimate_restore
from agent.domain.restore_target import RestoreTarget
from agent.errors import ConfigError, NoRestorePath
from agent.outside import outside
from agent.postgres.server_checks import Check
from agent.repository.backups import read_catalog
from agent.repository.key_check import refuse_other_key
from agent.repository.restore_record import read_restore_rates
from agent.restore.outcome import RestoreOutcome
from agent.restore.planner import plan_from_repository
from agent.restore.preflight import preflight
from agent.settings import Settings, load_settings
from agent.telemetry.logging import configure_logging

PlanOnly = Annotated[bool, typer.Option("--plan", help="Say whether and how the target is reached; change nothing.")]


def target_json(target: RestoreTarget) -> dict[str, Any]:
    """Return the JSON form of a target: its kind, its value under the kind's name, and how it is applied."""
    values = {"time": target.time, "lsn": target.lsn, "xid": target.xid, "name": target.name}
    if target.lsn is not None:
        values["lsn"] = format_lsn(target.lsn)
    given = {name: value for name, value in values.items() if value is not None}
    return {"kind": target.kind.value, **given, "inclusive": target.inclusive, "timeline": target.timeline}


def plan_json(plan: RestorePlan, estimate: RestoreEstimate, problems: Sequence[ConfigError]) -> dict[str, Any]:
    """Return the keys that `pitr restore --plan --json` promises, for a target that can be reached."""
    return {
        "reachable": True,
        "reason": plan.note,
        "target": target_json(plan.target),
        "backup": plan.backup.name,
        "chain": [backup.name for backup in plan.chain],
        "timeline": plan.timeline,
        "wal": {"first": plan.first_segment, "last": plan.last_segment, "segments": len(plan.segments)},
        "download_bytes": plan.download_bytes,
        "restored_bytes": plan.restored_bytes,
        "disk_bytes": plan.disk_bytes,
        "download_seconds": None if plan.download_seconds is None else round(plan.download_seconds, 1),
        "hydrate_seconds": None if estimate.hydrate_seconds is None else round(estimate.hydrate_seconds, 1),
        "replay_seconds": round(estimate.replay_seconds, 1),
        "replay_measured_at": estimate.replay_measured_at,
        "nearest": {"before": None, "after": None},
        "problems": [{"problem": problem.message, "next_step": problem.hint} for problem in problems],
    }


def no_plan_json(target: RestoreTarget, error: NoRestorePath) -> dict[str, Any]:
    """Return the same keys for a target that cannot be reached."""
    return {
        "reachable": False,
        "reason": error.one_line(),
        "target": target_json(target),
        "backup": None,
        "chain": [],
        "timeline": None,
        "wal": None,
        "download_bytes": 0,
        "restored_bytes": 0,
        "disk_bytes": 0,
        "download_seconds": None,
        "hydrate_seconds": None,
        "replay_seconds": None,
        "replay_measured_at": None,
        "nearest": {"before": error.nearest_before, "after": error.nearest_after},
        "problems": [],
    }


def restore_command(plan: PlanOnly = False, as_json: Json = False) -> None:
    """Restore what TARGET_... and BACKUP_NAME ask for into PGDATA; AUTO_START=true replays and promotes, too.

    Set one of these, or none for everything that is archived:

    TARGET_TIME=2026-11-22T14:29:59Z: what was committed up to then; with its zone

    TARGET_XID=2926 TARGET_INCLUSIVE=false: what was committed before that transaction

    TARGET_LSN=0/5A3B2C10 or TARGET_NAME=before_release: up to that position, or restore point

    PGDATA has to be empty. `pitr wal around` finds the moment; --plan says whether it can be reached.
    """
    if plan:
        _plan(as_json=as_json)
        return
    from agent.restore_mode import restore  # a plan needs none of it

    settings = load_settings()
    settings.require_data_directory()
    configure_logging("warning" if err.is_terminal else settings.log_level, sys.stderr)
    with ProgressBar("planning") as bar:
        outcome = uvloop.run(restore(settings, bar.report))
    if as_json:
        print_json(outcome_json(outcome))
    else:
        out.print(outcome_text(outcome), markup=False)


def _plan(*, as_json: bool) -> None:
    settings = load_settings()
    configure_logging("error", sys.stderr)
    try:
        plan, estimate, problems = uvloop.run(_planned(settings))
    except NoRestorePath as error:
        if not as_json:
            raise
        print_json(no_plan_json(settings.target, error))
        sys.exit(error.exit_code)
    if as_json:
        print_json(plan_json(plan, estimate, problems))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("target", Text(f"{plan.target} can be reached"))
    if plan.note:
        table.add_row("note", Text(plan.note))
    table.add_row("base backup", " then ".join(backup.name for backup in plan.chain))
    table.add_row("finished", f"{plan.backup.finish_time:%Y-%m-%d %H:%M:%S} UTC")
    table.add_row("timeline", str(plan.timeline))
    table.add_row("WAL", f"{len(plan.segments)} segments, {plan.first_segment} to {plan.last_segment}")
    seconds = plan.download_seconds
    took = "" if seconds is None else f", at most {seconds_text(seconds)} at the rate that planning saw"
    table.add_row("download", size_text(plan.download_bytes) + took)
    if estimate.hydrate_seconds is not None:
        table.add_row("hydrate", _took(estimate.hydrate_seconds, estimate.hydrate_measured_at))
    table.add_row("replay", _took(estimate.replay_seconds, estimate.replay_measured_at))
    table.add_row("on disk", f"{size_text(plan.disk_bytes)}, and what replay adds")
    for problem in problems:
        table.add_row("[red]not here[/red]", Text(problem.one_line()))
    out.print(table)


async def _planned(settings: Settings) -> tuple[RestorePlan, RestoreEstimate, list[ConfigError]]:
    """Return how the target that the settings name is reached, how long it takes, and what keeps it from being done.

    Nothing of a base backup is downloaded. Without PGDATA only the repository is asked.

    Raises:
        NoRestorePath: It cannot be reached.
        RepositoryError: The repository could not be read.
    """
    async with outside(settings, retry_seconds=PATIENCE_SECONDS) as opened:
        await opened.store.check()
        await refuse_other_key(opened.store, opened.objects)
        catalog = await read_catalog(opened.store)
        plan = await plan_from_repository(
            opened.store, opened.archive, settings.target, settings.backup_name, catalog=catalog
        )
        estimate = estimate_restore(plan, await read_restore_rates(opened.store, catalog))
        here = settings.data_directory is not None
        return plan, estimate, await preflight(opened.store, settings, plan) if here else []


def _took(seconds: float, measured_at: datetime | None) -> str:
    if measured_at is None:
        rate = size_text(ASSUMED_REPLAY_RATE)
        return f"{seconds_text(seconds)} if it does {rate} a second: nothing has measured it yet"
    return f"{seconds_text(seconds)} at the rate that the restore of {measured_at:%Y-%m-%d %H:%M} UTC measured"


def outcome_json(outcome: RestoreOutcome) -> dict[str, Any]:
    """Return the JSON form of what a restore came to."""
    return {
        "stage": outcome.stage.value,
        "data_directory": str(outcome.data_directory),
        "backup": outcome.backup,
        "target": outcome.target,
        "timeline": outcome.timeline,
        "new_timeline": outcome.new_timeline,
        "last_commit_at": outcome.last_commit_at,
        "wal_bytes": outcome.wal_bytes,
        "prepared_transactions": outcome.prepared_transactions,
        "checks": [asdict(check) for check in outcome.checks],
        "note": outcome.note,
        "seconds": dict(outcome.seconds),
    }


def outcome_text(outcome: RestoreOutcome) -> str:
    """Return what a restore came to, for people: one line, and what the plan had to say."""
    note = f"\nnote: {outcome.note}" if outcome.note else ""
    if outcome.prepared_transactions:
        count = outcome.prepared_transactions
        note += f"\nin doubt: {count} prepared transactions hold locks until they are ended: see pg_prepared_xacts"
    took = seconds_text(sum(outcome.seconds.values()))
    if outcome.new_timeline is None:
        return (
            f"{outcome.data_directory} is hydrated from {outcome.backup} in {took}: start PostgreSQL there, beside an "
            f"agent, and it follows WAL to {outcome.target}{note}"
        )
    last = f"last transaction {outcome.last_commit_at:%Y-%m-%d %H:%M:%S.%f} UTC, " if outcome.last_commit_at else ""
    wal = f"{size_text(outcome.wal_bytes)} of WAL, " if outcome.wal_bytes is not None else ""
    stages = ", ".join(f"{stage} {seconds_text(seconds)}" for stage, seconds in outcome.seconds.items())
    checked = f"; {checks_text(outcome.checks)}" if outcome.checks else ""
    return (
        f"{outcome.data_directory} is restored to {outcome.target} in {took}{f' ({stages})' if stages else ''}: {last}"
        f"{wal}timeline {outcome.new_timeline}, stopped cleanly{checked}{note}"
    )


def checks_text(checks: Sequence[Check]) -> str:
    """Say how many checks a restored server passed."""
    return f"{len(checks)} checks passed" if len(checks) != 1 else "1 check passed"
