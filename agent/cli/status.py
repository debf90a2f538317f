"""`pitr status`: how the running agent is, and what it says beside the catalog."""

import asyncio
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any

import uvloop
from rich.table import Table
from rich.text import Text

from agent.cli.control import ask
from agent.cli.terminal import Json, out, print_json, seconds_text, size_text
from agent.errors import AgentError
from agent.server.control_paths import STATUS_PATH
from agent.settings import Settings, load_settings

FOOTER_SECONDS = 5.0  # the catalog is the answer; the agent's word is an extra


def status_command(as_json: Json = False) -> None:
    """Show how the running agent is: what is wrong, WAL, base backups, what comes next."""
    status = uvloop.run(ask(load_settings().socket, STATUS_PATH))
    if as_json:
        print_json(status)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in _finding_rows(status["findings"]):
        table.add_row(*finding)
    rows = [*_wal_rows(status["wal"]), *backup_rows(status["backups"]), *_reading_rows(status), *_drill_rows(status)]
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def print_agents_word(settings: Settings, listed: Collection[str]) -> None:
    """Print what the agent beside us says of base backups; nothing where none runs, as on a laptop.

    Nothing either if its newest are not among those `listed`: they are another repository's.
    """

    async def read() -> dict[str, Any]:
        async with asyncio.timeout(FOOTER_SECONDS):
            return await ask(settings.socket, STATUS_PATH)

    try:
        status = uvloop.run(read())
    except (AgentError, TimeoutError):
        return
    if any(newest["name"] not in listed for newest in status["backups"]["newest"]):
        return
    out.print()
    for name, text in backup_rows(status["backups"]):
        out.print(f"{name}: {text}", markup=False)


def _finding_rows(findings: list[dict[str, Any]]) -> Iterator[tuple[Text, Text]]:
    for finding in findings:
        colour = "red" if finding["severity"] == "critical" else "yellow"
        yield Text(finding["alert"], style=f"bold {colour}"), Text(finding["text"])
        yield Text("what to do"), Text(finding["what_to_do"])


def _wal_rows(wal: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "last archived", wal["last_archived"] or "nothing since the agent started"
    waiting = f"{wal['backlog_files']} WAL files, {size_text(wal['backlog_bytes'])}"
    if wal["backlog_files"]:
        waiting += f", the oldest for {seconds_text(wal['backlog_oldest_seconds'])}"
    yield "to archive", waiting
    if (awaited := wal["awaited"]) is not None:
        since = time_text(awaited["since"])
        yield "recovery waits", f"for {awaited['name']} since {since}, attempt {awaited['attempts']}"
    for gap in wal["gaps"]:
        missing = f"{gap['segments']} segments, {gap['first_missing']} to {gap['last_missing']}"
        yield "WAL missing", missing


def _reading_rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    reading = status.get("reading")
    if reading is None:
        return
    if reading["running"] is not None:
        yield "reading back", f"{100 * reading['running']['ratio']:.0f} % of what is read today"
    elif reading["schedule"] is None:
        yield "reading back", "never: PITR_VERIFY_SCHEDULE is empty"
    elif reading["ended_at"] is not None:
        yield "read back", time_text(reading["ended_at"])
    if reading["failure"] is not None:
        yield "not read back", f"{time_text(reading['failure']['at'])}: {reading['failure']['reason']}"


def _drill_rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    drills = status.get("drills")
    if drills is not None and drills["succeeded"] is not None:
        drill = drills["succeeded"]
        took = seconds_text(drill["seconds"])
        yield "last drill", f"{time_text(drill['at'])}: {drill['backup']} to {time_text(drill['moment'])} in {took}"


def backup_rows(backups: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what to say of base backups: what it is, and the words."""
    for newest in backups["newest"]:
        yield f"newest {newest['kind']} backup", f"{newest['name']}, finished {time_text(newest['finish_time'])}"
    if backups["running"] is not None:
        yield "running", progress_text(backups["running"])
    if backups["last_failure"] is not None:
        failure = backups["last_failure"]
        yield "last failure", f"{time_text(failure['at'])}: {failure['reason']}"
    if backups["next"] is not None:
        yield "next", f"{time_text(backups['next']['at'])} ({backups['next']['why']})"
    elif backups["schedule"] is None:
        yield "next", "none: PITR_BACKUP_SCHEDULE is empty"
    if backups["waiting_for"] is not None:
        yield "waiting", backups["waiting_for"]


def time_text(text: str) -> str:
    """Write a time of the JSON form for people: `2026-11-23 02:00:04 UTC`."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def progress_text(running: dict[str, Any]) -> str:
    """Write how far a base backup is in one line: stage, share, speed, time left."""
    parts = [running["stage"]]
    if running["total_bytes"]:
        done, total = size_text(running["done_bytes"]), size_text(running["total_bytes"])
        parts.append(f"{100 * running['ratio']:.0f} % ({done} of {total})")
    if running["bytes_per_second"]:
        parts.append(f"{running['bytes_per_second'] / (1 << 20):.1f} MiB/s")
    if running["seconds_left"] is not None:
        parts.append(f"{seconds_text(running['seconds_left'])} left")
    return ", ".join([*parts, f"running for {seconds_text(running['seconds'])}"])
