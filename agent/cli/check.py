"""`pitr check`: one page of what is right, what is not, and what to do about it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, groupby, repeat
from typing import Annotated, Any

import typer
import uvloop
from rich.table import Table
from rich.text import Text

from agent.check.checker import Checker, Repository
from agent.cli.control import ask
from agent.cli.terminal import Json, out, print_json
from agent.domain.checks import Finding, Section, Verdict, exit_code_of
from agent.domain.volume_checks import RunningAgent
from agent.errors import AgentAnswer, AgentError, AgentUnavailable
from agent.outside import Outside, outside
from agent.postgres.connection import PostgresServer
from agent.server.control_paths import STATUS_PATH
from agent.settings import Settings, load_settings
from agent.storage.clock import SystemClock
from agent.storage.s3_bucket import TimeLimits
from agent.storage.s3_doctor import examine_bucket
from agent.telemetry.logging import configure_logging

RETRY_SECONDS = 3.0
_MARGIN = 8  # of the names and the fixes
_SILENCE_SECONDS = 15.0  # a person waits
_STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red", Verdict.SKIP: "dim"}


def check_command(
    as_json: Json = False,
    switch: Annotated[
        bool, typer.Option("--switch/--no-switch", help="End a WAL segment and follow it into the repository.")
    ] = True,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for that segment.")] = 60,
) -> None:
    """Check settings, rights, volume, agent and store, then follow a WAL segment into the repository."""
    configure_logging("error", sys.stderr)
    sections = uvloop.run(_check(load_settings(), wait if switch else None))
    if as_json:
        print_json(check_json(sections))
    else:
        _print(sections)
    raise typer.Exit(exit_code_of(sections))


async def _check(settings: Settings, switch_patience: float | None) -> list[Section]:
    async with AsyncExitStack() as stack:
        repository: Repository | AgentError
        try:
            opened = await stack.enter_async_context(outside(settings, retry_seconds=RETRY_SECONDS))
            repository = _repository(opened)
        except AgentError as error:
            repository = error
        postgres = PostgresServer(settings.postgres)
        checker = Checker(settings, repository, postgres, partial(_running_agent, settings), SystemClock())
        return await checker.run(switch_patience)


def _repository(opened: Outside) -> Repository:
    s3 = opened.settings.s3
    limits = TimeLimits(silence=_SILENCE_SECONDS)
    examine = partial(examine_bucket, s3, opened.clock, limits) if s3 is not None else None
    return Repository(opened.store, opened.objects, opened.archive, examine)


async def _running_agent(settings: Settings) -> RunningAgent:
    try:
        status = await ask(settings.socket, STATUS_PATH)
    except AgentAnswer as error:
        raise AgentUnavailable(error.message, hint=error.hint) from error
    return RunningAgent(
        version=status["version"],
        started_at=datetime.fromisoformat(status["started_at"]),
        backlog_files=status["wal"]["backlog_files"],
        wrong=tuple((each["text"], each["what_to_do"]) for each in status["findings"]),
    )


def check_json(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the keys that `pitr check --json` promises."""
    code = exit_code_of(sections)
    return {
        "ok": code == 0,
        "exit_code": code,
        "checks": [
            {
                "section": section.title,
                "check": each.subject,
                "result": each.verdict,
                "text": each.text,
                "fix": each.fix or None,
                "exit_code": each.exit_code,
            }
            for section in sections
            for each in section.findings
        ],
    }


def _print(sections: Sequence[Section]) -> None:
    findings = [each for section in sections for each in section.findings]
    widest = max(len(each.subject) for each in findings)
    for section in sections:
        out.print(Text(section.title, style="bold"))
        for each in _together(section.findings):
            out.print(_row(each, widest))
            for arrow, line in zip(chain(["->"], repeat("  ")), each.fix.splitlines(), strict=False):
                # Whole, to be copied: the terminal wraps it.
                out.print(Text(f"{' ' * _MARGIN}{arrow} {line}", style="cyan"), soft_wrap=True)
        out.print()
    counts = {verdict: sum(each.verdict is verdict for each in findings) for verdict in Verdict}
    out.print(
        ", ".join(f"[{_STYLES[verdict]}]{count} {verdict.upper()}[/]" for verdict, count in counts.items() if count)
    )


def _row(finding: Finding, widest: int) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=_MARGIN - 2, justify="right", no_wrap=True)
    row.add_column(width=widest, no_wrap=True)
    row.add_column(overflow="fold")
    verdict = Text(finding.verdict.upper(), style=_STYLES[finding.verdict])
    row.add_row(verdict, finding.subject, Text(finding.text))
    return row


def _together(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield the findings; what was left out for one reason, one after the other, as one."""
    for verdict, group in groupby(findings, key=lambda each: (each.verdict, each.text)):
        alike = list(group)
        if verdict[0] is Verdict.SKIP and len(alike) > 1:
            names = ", ".join(each.subject for each in alike)
            yield replace(alike[0], subject=f"{len(alike)} checks", text=f"{names}: {alike[0].text}")
        else:
            yield from alike
