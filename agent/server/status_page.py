"""The status page: one HTML document from the status, for a tired person on a phone. It reads only.

It needs no script and nothing from elsewhere, and says so to the browser. The template engine escapes every value.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from agent.domain.restore_target import format_time
from agent.server.drawing import draw
from agent.telemetry.status import AgentStatus, CompleteBackup, RestoreModeStatus
from agent.telemetry.words import age_text, seconds_text, size_text, time_text

if TYPE_CHECKING:
    from jinja2 import Template

REFRESH_SECONDS, BUSY_REFRESH_SECONDS = 15, 5
_FEW, _MOST = 10, 200  # base backups: at once, and on demand
_PAGES = Path(__file__).parent / "pages"
_STYLE = (_PAGES / "style.css").read_text()
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What the answer with the page must say."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first line of the page. level: good, warning, critical, busy or unknown."""

    level: str
    title: str
    text: str

    @property
    def icon_colour(self) -> str:
        """Colour of the icon on the browser's tab, as a data URL writes it."""
        colours = {"good": "1a7f37", "warning": "d29922", "critical": "c6262e", "busy": "1f5fae", "unknown": "59636e"}
        return f"%23{colours[self.level]}"


def render(status: AgentStatus | RestoreModeStatus, *, all_backups: bool = False) -> str:
    """Return the page, with the newest base backups or, as far as a page can hold them, all of them."""
    if isinstance(status, RestoreModeStatus):
        return _template("restore.html").render(
            status=status, verdict=restore_verdict(status), style=_STYLE, refresh_seconds=BUSY_REFRESH_SECONDS
        )
    return _template("archive.html").render(
        status=status,
        verdict=verdict(status),
        drawing=draw(status),
        chains=chains(status.backups.catalog),
        read_back={} if status.reading is None else {each.name: each for each in status.reading.backups},
        drills={} if status.drills is None else {each.name: each for each in status.drills.backups},
        style=_STYLE,
        refresh_seconds=BUSY_REFRESH_SECONDS if status.backups.running is not None else REFRESH_SECONDS,
        few=_FEW,
        most=_MOST,
        all_backups=all_backups,
    )


def verdict(status: AgentStatus) -> Verdict:
    """Say in a line how it is."""
    window, findings = status.window, status.findings
    reach = "It is not known yet what can be restored."
    if window is not None and window.to_time is None:
        reach = "Nothing can be restored."
    elif window is not None and window.to_time is not None:
        reach = f"Restorable up to the last archived transaction, {age_text(window.to_time, status.now)}."
    if status.store is not None and status.store.foreign is not None:
        reach = "What can be restored here is another database cluster's: nothing of this server is."
    if findings:
        worst = findings[0].severity
        title = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
        return Verdict(worst, title, reach)
    if window is None:
        return Verdict("unknown", "Starting", reach)
    if window.to_time is None:
        return Verdict("warning", "Not protected yet", reach)
    return Verdict("good", "All is well", reach)


def restore_verdict(status: RestoreModeStatus) -> Verdict:
    """Say in a line how a restore is."""
    work = status.restore
    level, trouble = "busy", ""
    if status.store is not None and status.store.failing_since is not None:
        since = seconds_text((status.now - status.store.failing_since).total_seconds())
        level, trouble = "warning", f" The store has not answered for {since}, it is tried again: {status.store.reason}"
    if work is None or work.stage is None:
        return Verdict(level, "Restore", f"It begins or ends.{trouble}")
    share = f", {100 * work.ratio:.0f} %" if work.total_bytes else ""
    target = f"To {work.target}." if work.target is not None else "It is not planned yet."
    return Verdict(level, f"Restore: {work.stage}{share}", f"{target}{trouble}")


def chains(catalog: Sequence[CompleteBackup]) -> dict[str, str]:
    """Say of each base backup by name what it takes to restore it: `full`, `full + 2 deltas`."""
    parents = {backup.name: backup.parent for backup in catalog}
    return {name: _chain(name, parents) for name in parents}


def _chain(name: str, parents: Mapping[str, str | None]) -> str:
    deltas, each = 0, name
    while (parent := parents[each]) is not None:
        deltas, each = deltas + 1, parent
        if each not in parents or deltas > len(parents):
            return f"broken: {each} is missing"
    return "full" if not deltas else f"full + {deltas} delta{'s' if deltas > 1 else ''}"


@cache
def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: most commands need no page

    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "at": time_text,
        "ago": age_text,
        "seconds": seconds_text,
        "rfc3339": format_time,
        "size": size_text,
    }
    return environment.get_template(name)
