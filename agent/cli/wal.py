"""`pitr wal around TIME`: which transactions ended then, which of them dropped something, and how to go back before."""

import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any

import typer
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from agent.cli.terminal import PATIENCE_SECONDS, Json, err, out, print_json, size_text
from agent.domain.file_node import FileNode
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import format_time, parse_time
from agent.domain.transactions import EndedTransaction
from agent.domain.wal_around import Around
from agent.errors import ConfigError
from agent.outside import outside
from agent.repository.key_check import refuse_other_key
from agent.repository.wal_around import NearTransactions, read_around
from agent.settings import Settings, load_settings
from agent.telemetry.logging import configure_logging

_MOST_COMMANDS = 5
_MOST_RELATIONS = 3
_DURATION = re.compile(r"(\d{1,6})(s|m|h|)")
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_MICROSECOND = timedelta(microseconds=1)

commands = typer.Typer(no_args_is_help=True, help="Look into the archived WAL.")

Moment = Annotated[str, typer.Argument(metavar="TIME", help="ISO 8601 with a zone: 2026-11-22T14:30:00+01:00.")]
Before = Annotated[str, typer.Option("--before", help="How far to look back: 90s, 15m, 2h.")]
After = Annotated[str, typer.Option("--after", help="How far to look on.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Show so many at most: marked ones, then the nearest.")]
Segments = Annotated[int, typer.Option("--segments", min=1, help="Read so many WAL segments at most, the nearest.")]


@commands.callback()
def _wal() -> None:
    """Keep `around` a command of its own."""


@commands.command("around")
def around_command(
    moment: Moment,
    before: Before = "60s",
    after: After = "60s",
    limit: Limit = 40,
    segments: Segments = 64,
    as_json: Json = False,
) -> None:
    """List the transactions that ended near TIME, what they touched, and how to restore to just before one."""
    settings = load_settings()
    configure_logging("error", sys.stderr)
    time = parse_time("TIME", moment)
    try:
        around = Around(time, time - _duration("--before", before), time + _duration("--after", after))
    except OverflowError:
        raise ConfigError(
            f"TIME {moment} with {before} before and {after} after it is not within the years 1 to 9999",
            hint="Correct TIME, --before or --after.",
        ) from None
    found = uvloop.run(_read(settings, around, limit, segments))
    if as_json:
        print_json(near_json(found, settings.target.timeline))
        return
    for line in _lines(found):
        out.print(line)
    for line in _next_commands(found, settings.target.timeline):
        out.print(line, soft_wrap=True)


def _duration(name: str, text: str) -> timedelta:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name} {text!r} is not a duration", hint="Write for example 90s, 15m or 2h.")
    return timedelta(seconds=int(match[1]) * _UNIT_SECONDS[match[2]])


async def _read(settings: Settings, around: Around, limit: int, segments: int) -> NearTransactions:
    columns = (TextColumn("reading WAL"), BarColumn(), MofNCompleteColumn())
    async with outside(settings, retry_seconds=PATIENCE_SECONDS) as opened:
        await opened.store.check()
        await refuse_other_key(opened.store, opened.objects)
        with ProgressBar(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("", total=None)
            return await read_around(
                opened.store,
                opened.archive,
                opened.objects,
                around,
                settings.target.timeline,
                limit=limit,
                most_segments=segments,
                report=lambda done, total: bar.update(task, completed=done, total=total),
            )


def target_before(ended: EndedTransaction, timeline: str) -> dict[str, str]:
    """Return the settings that restore to just before a transaction.

    DROP DATABASE removes files before it commits, so recovery has to stop before its first record.
    """
    target = {"TARGET_XID": str(ended.xid)}
    if ended.dropped_databases:
        target = {"TARGET_LSN": format_lsn(ended.first_lsn)}
    return {**target, "TARGET_INCLUSIVE": "false", **({} if timeline == "latest" else {"TARGET_TIMELINE": timeline})}


def near_json(found: NearTransactions, timeline: str) -> dict[str, Any]:
    """Return the keys of `pitr wal around --json`."""
    return {
        "time": found.around.moment,
        "from_time": found.around.begin,
        "to_time": found.around.end,
        "timeline": found.timeline,
        "wal": {
            "first": found.span.names[0],
            "last": found.span.names[-1],
            "segments": len(found.span.names),
            "complete": not found.span.is_cut and found.span.hole_before is None and found.span.hole_after is None,
        },
        "transactions": [_transaction_json(found, ended, timeline) for ended in found.transactions],
        "left_out": found.left_out,
        "nearest": {
            "before": found.before and _transaction_json(found, found.before, timeline),
            "after": found.after and _transaction_json(found, found.after, timeline),
        },
    }


def _transaction_json(found: NearTransactions, ended: EndedTransaction, timeline: str) -> dict[str, Any]:
    return {
        "time": ended.time,
        "xid": ended.xid,
        "lsn": format_lsn(ended.lsn),
        "first_lsn": format_lsn(ended.first_lsn),
        "ended": "commit" if ended.commits else "abort",
        "records": ended.records,
        "wal_bytes": ended.wal_bytes,
        "subtransactions": ended.subtransactions,
        "marks": [mark.value for mark in ended.marks],
        "relations": [
            {**_file_json(found, file), "inserted": rows.inserted, "updated": rows.updated, "deleted": rows.deleted}
            for file, rows in sorted(ended.rows.items())
        ],
        "dropped": [{**_file_json(found, file), "bytes": found.sizes.get(file)} for file in ended.dropped],
        "dropped_databases": list(ended.dropped_databases),
        "target_before": target_before(ended, timeline),
    }


def _file_json(found: NearTransactions, file: FileNode) -> dict[str, Any]:
    relation = found.names(file)
    return {
        "file": str(file),
        "tablespace": file.tablespace,
        "name": relation and relation.name,
        "kind": relation and relation.kind,
    }


def _lines(found: NearTransactions) -> Iterator[str | Text | Table]:
    around, span = found.around, found.span
    stretch = f"from {around.begin:%Y-%m-%d %H:%M:%S} to {around.end:%H:%M:%S} UTC"
    count = len(found.transactions) + found.left_out
    noun = "transaction" if count == 1 else "transactions"
    yield f"{count or 'No'} {noun} ended {stretch}; WAL segments read: {len(span.names)}"
    if span.is_cut:
        yield (
            f"[yellow]More WAL is of that time: only {span.names[0]} to {span.names[-1]} were read. Shorten --before"
            " and --after, or raise --segments.[/]"
        )
    yield from (f"[red]{hole}.[/]" for hole in (span.hole_before, span.hole_after) if hole is not None)
    if found.left_out:
        yield f"Not shown: {found.left_out}, farther from the moment and not marked; raise --limit to see them."
    shown = list(found.transactions) or [each for each in (found.before, found.after) if each is not None]
    if shown and not count:
        yield "Nearest to it:"
    yield ""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading, justify in (("ended, UTC", "left"), ("xid", "right"), ("LSN", "left"), ("WAL", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("what", overflow="fold")
    for ended in shown:
        when = f"{ended.time:%H:%M:%S.%f}" if count else f"{ended.time:%Y-%m-%d %H:%M:%S.%f}"
        style = "" if ended.commits else "dim"
        size = size_text(ended.wal_bytes)
        table.add_row(when, str(ended.xid), format_lsn(ended.lsn), size, _what(found, ended), style=style)
    yield table


def _what(found: NearTransactions, ended: EndedTransaction) -> Text:
    """Say what a transaction did, in a line."""
    text = Text()
    for mark in ended.marks:
        text.append(mark.value, style="bold red").append(" ")
    if not ended.commits:
        text.append("rolled back ")
    parts = [_dropped_text(found, ended)] if ended.marks and (ended.dropped or ended.dropped_databases) else []
    touched = [(file, rows) for file, rows in ended.rows.items() if not file.is_catalog]
    touched.sort(key=lambda each: -(each[1].deleted + each[1].updated + each[1].inserted))
    for file, rows in touched[:_MOST_RELATIONS]:
        relation = found.names(file)
        counts = [(rows.deleted, "deleted"), (rows.updated, "updated"), (rows.inserted, "inserted")]
        did = ", ".join(f"{number:,} {verb}" for number, verb in counts if number)
        parts.append(f"{relation.name if relation else file}: {did}")
    if len(touched) > _MOST_RELATIONS:
        parts.append(f"{len(touched) - _MOST_RELATIONS} more relations")
    if not parts and ended.records > 1:
        parts.append("system catalogs" if ended.rows else "no rows")
    return text.append("; ".join(parts))


def _dropped_text(found: NearTransactions, ended: EndedTransaction) -> str:
    """Name what went away, tables first; the files of what has no name here."""
    databases = [f"database {number}" for number in ended.dropped_databases]
    if ended.dropped_databases:
        return ", ".join(databases)
    known = {file: relation for file in ended.dropped if (relation := found.names(file)) is not None}
    shown = [relation for relation in known.values() if not relation.name.startswith("pg_toast")]
    tables = [str(relation) for relation in shown if relation.kind in ("table", "materialized view")]
    others = [str(relation) for relation in shown if relation.kind in ("index", "sequence")]
    unnamed = [f"file {file}" for file in ended.dropped if file not in known]
    names = [*tables, *others, *unnamed]
    more = f" and {len(names) - _MOST_RELATIONS} more" if len(names) > _MOST_RELATIONS else ""
    size = sum(found.sizes.get(file, 0) for file in ended.dropped)
    return ", ".join(names[:_MOST_RELATIONS]) + more + (f" ({size_text(size)})" if size else "")


def _next_commands(found: NearTransactions, timeline: str) -> Iterator[str]:
    """Say how to go back to just before each transaction that is marked, the worst first."""
    marked = sorted((ended for ended in found.transactions if ended.marks), key=lambda ended: ended.rank)
    for ended in marked[:_MOST_COMMANDS]:
        target = " ".join(f"{name}={value}" for name, value in target_before(ended, timeline).items())
        yield f"\nTo restore to just before the [bold]{ended.marks[0].value}[/] of transaction {ended.xid}:"
        yield f"  {target} pitr restore --plan"
        if not ended.dropped_databases:
            yield f"  or, to the time before it: TARGET_TIME={format_time(ended.time - _MICROSECOND)}"
    if len(marked) > _MOST_COMMANDS:
        yield f"\n{len(marked) - _MOST_COMMANDS} more are marked: TARGET_XID=... TARGET_INCLUSIVE=false likewise."
