"""`pitr window`: what can be restored, as a sentence, as bars, and as JSON."""

import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import uvloop
from rich.text import Text

from agent.cli.terminal import PATIENCE_SECONDS, Json, out, print_json, seconds_text
from agent.domain.archived_path import ArchivedPath, Holdings
from agent.domain.lsn import format_lsn
from agent.domain.restore_target import format_time
from agent.domain.window import RestorableRange, TimelineWindow, WalGap, Window
from agent.outside import outside
from agent.repository.window import WindowView, read_window
from agent.settings import load_settings
from agent.telemetry.logging import configure_logging

_WIDEST_BAR = 100
_SECOND = timedelta(seconds=1)
_INK = {"covered": "█", "backup": "◆", "gap": "░", "outside": " "}
_PLAIN_INK = {"covered": "=", "backup": "B", "gap": ".", "outside": " "}
_STYLE = {"covered": "green", "backup": "bold cyan", "gap": "bold red", "outside": ""}


def window_json(window: Window) -> dict[str, Any]:
    """Return the keys that `pitr window --json` promises."""
    return {
        "system_identifier": window.system_identifier,
        "latest": window.latest,
        "timelines": [
            {
                "timeline": each.timeline,
                "parent": each.parent,
                "switch_lsn": None if each.switch_lsn is None else format_lsn(each.switch_lsn),
                "ranges": [_range_json(reach) for reach in each.ranges],
            }
            for each in window.timelines
        ],
        "gaps": [
            {
                "timeline": gap.timeline,
                "first_missing": gap.first_missing,
                "last_missing": gap.last_missing,
                "segments": gap.segments,
            }
            for gap in window.gaps
        ],
    }


def _range_json(reach: RestorableRange) -> dict[str, Any]:
    return {
        "backup": reach.backup,
        "from_time": reach.from_time,
        "from_lsn": format_lsn(reach.from_lsn),
        "to_time": reach.to_time,
        "to_lsn": format_lsn(reach.to_lsn),
    }


def window_command(as_json: Json = False) -> None:
    """Show what can be restored: from when to when on each timeline, and where WAL is missing."""
    configure_logging("error", sys.stderr)

    async def read() -> WindowView:
        async with outside(load_settings(), retry_seconds=PATIENCE_SECONDS) as opened:
            await opened.store.check()
            return await read_window(opened.store, opened.archive)

    view = uvloop.run(read())
    if as_json:
        print_json(window_json(view.window))
        return
    for line in sentences(view.window, datetime.now(UTC)):
        out.print(line)
    bars = bars_of(view.window, view.held, width=min(out.width - 2, _WIDEST_BAR), plain=not _draws_blocks())
    if bars:
        out.print()
    for bar in bars:
        out.print(bar, no_wrap=True, crop=False)


def _draws_blocks() -> bool:
    try:
        "".join(_INK.values()).encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sentences(window: Window, now: datetime) -> list[str]:
    """Answer in words what can be restored, the present first."""
    latest = next((each for each in window.timelines if each.timeline == window.latest), None)
    current = window.current
    if latest is None or current is None:
        return ["Nothing can be restored: there is no base backup with the WAL that it needs. `pitr backup now`."]
    first = latest.ranges[0]
    lines = [_answer(first, current)]
    for before, after in zip(latest.ranges, latest.ranges[1:], strict=False):
        lines.append(f"  except after {_down(before)}, before {_up(after)}: WAL is missing")
    lines.extend(_gap_line(gap) for gap in window.gaps)
    if not current.is_one_state:
        lines.append(f"The last archived transaction is {seconds_text((now - current.to_time).total_seconds())} old.")
    others = [each for each in window.timelines if each is not latest and each.ranges]
    lines.extend(
        f"With TARGET_TIMELINE={each.timeline}: up to {_down(each.ranges[-1])} UTC, as it went on there."
        for each in others
        if each.ranges[-1].to_lsn > _left_at(each, window)
    )
    return lines


def _answer(first: RestorableRange, last: RestorableRange) -> str:
    if first is last and first.is_one_state:
        return (
            f"Only the state of [bold]{_up(first)} UTC[/bold] can be restored, of base backup {first.backup} "
            "(TARGET_IMMEDIATE=true): no transaction after it is archived."
        )
    return f"Any moment from [bold]{_up(first)}[/bold] to [bold]{_down(last)} UTC[/bold] can be restored."


def _left_at(timeline: TimelineWindow, window: Window) -> int:
    """Return where the way to the latest timeline leaves `timeline`."""
    return min((e.switch_lsn for e in window.timelines if e.parent == timeline.timeline and e.switch_lsn), default=0)


def _gap_line(gap: WalGap) -> str:
    if gap.segments == 1:
        return f"[red]WAL segment {gap.first_missing} is missing.[/red]"
    return f"[red]WAL segments {gap.first_missing} to {gap.last_missing} are missing ({gap.segments}).[/red]"


def _up(reach: RestorableRange) -> str:
    """Write where a range begins, so that it can be typed back: rounded up to seconds unless it is very short."""
    moment = reach.from_time
    if reach.to_time - reach.from_time < 2 * _SECOND:
        return _exact(moment)
    return f"{moment + (_SECOND - timedelta(microseconds=1)):%Y-%m-%d %H:%M:%S}"


def _down(reach: RestorableRange) -> str:
    if reach.to_time - reach.from_time < 2 * _SECOND:
        return _exact(reach.to_time)
    return f"{reach.to_time:%Y-%m-%d %H:%M:%S}"


def _exact(moment: datetime) -> str:
    return format_time(moment).removesuffix("Z").replace("T", " ")


def bars_of(window: Window, held: Holdings, *, width: int, plain: bool) -> list[Text]:
    """Draw each timeline that can be restored as a bar over one common stretch of time, base backups marked."""
    drawn = [each for each in window.timelines if each.ranges]
    if not drawn:
        return []
    begin = min(each.ranges[0].from_time for each in drawn)
    end = max(each.ranges[-1].to_time for each in drawn)
    labels = [f"timeline {each.timeline}" + (" (latest)" if each.timeline == window.latest else "") for each in drawn]
    margin = max(map(len, labels)) + 2
    cells = max(10, width - margin)
    scale = _Scale(begin, end, cells)
    ink = _PLAIN_INK if plain else _INK
    bars = [
        Text.assemble(label.ljust(margin), *((ink[kind], _STYLE[kind]) for kind in scale.draw(each, held)))
        for label, each in zip(labels, drawn, strict=True)
    ]
    first, last = (f"{moment:%Y-%m-%d %H:%M:%S}" for moment in (begin, end))
    ends = first.ljust(cells - len(last)) + last if cells > len(first + last) else first
    legend = [f"{ink['covered']} can be restored", f"{ink['backup']} base backup"]
    legend += [f"{ink['gap']} gap"] if any(len(each.ranges) > 1 for each in drawn) else []
    return [*bars, Text(" " * margin + ends), Text(" " * margin + "   ".join(legend), style="dim")]


class _Scale:
    """Places moments between `begin` and `end` in a row of cells."""

    def __init__(self, begin: datetime, end: datetime, cells: int) -> None:
        self._begin = begin
        self._span = max((end - begin).total_seconds(), 1e-6)
        self._cells = cells

    def draw(self, timeline: TimelineWindow, held: Holdings) -> list[str]:
        """Return what each cell shows: covered, backup, gap or outside. A gap shows, however short."""
        path = ArchivedPath(held, timeline.timeline)
        row = ["outside"] * self._cells
        for reach in timeline.ranges:
            for cell in range(self._cell(reach.from_time), self._cell(reach.to_time) + 1):
                row[cell] = "covered"
        for backup in filter(path.serves, held.backups):
            row[self._cell(backup.finish_time)] = "backup"
        for before, after in zip(timeline.ranges, timeline.ranges[1:], strict=False):
            start, stop = self._cell(before.to_time), self._cell(after.from_time)
            for cell in range(start + 1, stop) if stop - start > 1 else (start,):
                row[cell] = "gap"
        return row

    def _cell(self, moment: datetime) -> int:
        share = (moment - self._begin).total_seconds() / self._span
        return min(max(round(share * (self._cells - 1)), 0), self._cells - 1)
