"""`pitr verify`: whether everything that the base backups need is in the repository."""

from typing import Any

import uvloop

from agent.app import outside
from agent.cli.terminal import Json, out, print_json
from agent.settings import load_settings
from agent.verify.verifier import Verification, verify_repository

PATIENCE_SECONDS = 60.0


def verify_command(as_json: Json = False) -> None:
    """Check that every object of every base backup is there, of the recorded size, and that no WAL is missing."""

    async def verify() -> Verification:
        async with outside(load_settings(), retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            return await verify_repository(opened.store, opened.archive, opened.clock)

    found = uvloop.run(verify())
    if as_json:
        print_json(verification_json(found))
    else:
        _print(found)
    found.raise_if_broken()


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
            {"name": each.backup.name, "ok": not each.problems, "problems": list(each.problems)}
            for each in found.backups
        ],
    }


def _print(found: Verification) -> None:
    for each in found.backups:
        out.print(f"{each.backup.name} {'[red]broken[/red]' if each.problems else '[green]ok[/green]'}")
        for problem in each.problems:
            out.print(f"    {problem}")
    for gap in found.gaps:
        out.print(f"WAL from {gap.first} to {gap.last} is [red]missing[/red]: {gap.segments} segments")
    if found.is_ok:
        out.print(f"{len(found.backups)} base backups are whole, and no WAL after them is missing")
