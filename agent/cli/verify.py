"""`pitr verify`: whether everything that the base backups need is in the repository, and is what was stored."""

import sys
from typing import Annotated, Any

import typer
import uvloop

from agent.budget import MemoryBudget
from agent.cli.progress_bar import ProgressBar
from agent.cli.terminal import Json, err, out, print_json, size_text
from agent.outside import Outside, outside
from agent.settings import load_settings
from agent.telemetry.logging import configure_logging
from agent.telemetry.progress import ReportProgress
from agent.verify.content import Reading
from agent.verify.verifier import Verification, verify_content, verify_repository

PATIENCE_SECONDS = 60.0

Deep = Annotated[bool, typer.Option("--deep", help="Read everything back and check the content.")]
Name = Annotated[str | None, typer.Argument(metavar="NAME", help="With --deep: this base backup alone.")]


def verify_command(name: Name = None, deep: Deep = False, as_json: Json = False) -> None:
    """Check that every object of every base backup is there, of the recorded size, and that no WAL is missing.

    With --deep every object is read back: unpacked, compared with the backup manifest, page checksums verified.
    """
    if name is not None and not deep:
        raise typer.BadParameter("NAME is for --deep; without it all base backups are looked at")
    settings = load_settings()
    configure_logging("warning" if err.is_terminal else settings.log_level, sys.stderr)

    async def verify(report: ReportProgress) -> Verification:
        async with outside(settings, retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            found = await verify_repository(opened.store, opened.archive, opened.clock)
            return await verify_content(_reading(opened), found, report, name=name) if deep else found

    with ProgressBar("looking") as bar:
        found = uvloop.run(verify(bar.report))
    if as_json:
        print_json(verification_json(found))
    else:
        _print(found)
    found.raise_if_broken()


def _reading(opened: Outside) -> Reading:
    settings = opened.settings
    memory = MemoryBudget(settings.memory_limit)
    return Reading(opened.store, opened.objects, opened.archive, settings.download_concurrency, memory)


def verification_json(found: Verification) -> dict[str, Any]:
    """Return the keys that `pitr verify --json` promises."""
    return {
        "ok": found.is_ok,
        "gaps": [
            {
                "timeline": gap.timeline,
                "first_missing": gap.first,
                "last_missing": gap.last,
                "segments": gap.segments,
            }
            for gap in found.gaps
        ],
        "backups": [
            {"name": each.name, "ok": not each.problems, "problems": list(each.problems)} for each in found.backups
        ],
        "wal_problems": list(found.wal_problems),
        "read": None if found.read is None else {"objects": found.read.objects, "bytes": found.read.stored_bytes},
    }


def _print(found: Verification) -> None:
    for each in found.backups:
        out.print(f"{each.name} {'[red]broken[/red]' if each.problems else '[green]ok[/green]'}")
        for problem in each.problems:
            out.print(f"    {problem}", markup=False)
    for problem in found.wal_problems:
        out.print(problem, markup=False)
    for gap in found.gaps:
        out.print(f"WAL from {gap.first} to {gap.last} is [red]missing[/red]: {gap.segments} segments")
    if found.read is not None:
        out.print(f"read back: {found.read.objects} objects, {size_text(found.read.stored_bytes)}")
    if not found.backups:
        out.print("The repository holds no base backup: there is nothing to verify. Is it the right WALG_S3_PREFIX?")
    elif found.is_ok:
        whole = "1 base backup is" if len(found.backups) == 1 else f"{len(found.backups)} base backups are"
        out.print(f"{whole} whole, and no WAL that is needed is missing")
