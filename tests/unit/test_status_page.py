"""The status page as a document: what it says, that it is valid, and that no markup comes from the data."""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest
from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry

from agent.server.drawing import Drawing, draw
from agent.server.http import http_application
from agent.server.status_page import HEADERS, chains, render
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AgentStatus, AwaitedWal, RestoreModeStatus, RestoreStatus, StoreStatus
from tests.support.statuses import HOSTILE, broken, empty, healthy, hostile, running, starting, week

NOW = datetime(2026, 11, 23, 2, 3, 4, tzinfo=UTC)
RESTORE = RestoreStatus(
    "replaying", f"time {HOSTILE}", "base_000000010000000000000004", 1, HOSTILE, 8 << 20, 16 << 20, 0.5,
    4.0 * (1 << 20), 2.0, "0/2000000", "0/3000000", {"planning": 1.0, "hydrating": 20.0},
)  # fmt: skip
STATUSES = (healthy, running, broken, empty, starting, hostile)
VOID = {"meta", "link", "img", "br"}


class Document(HTMLParser):
    """Reads a page; every tag must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def words(page: str) -> str:
    return " ".join(Document(page).text.split())


@pytest.mark.parametrize("status", STATUSES)
def test_the_page_is_well_formed_and_needs_no_script_and_nothing_from_elsewhere(
    status: Callable[[], AgentStatus],
) -> None:
    page = render(status())
    document = Document(page)
    assert page.startswith("<!doctype html>")
    assert not {"script", "img", "iframe", "form", "object"} & set(document.tags)
    assert not {name for name in document.attributes if name.startswith("on")} | (
        {"style", "src"} & document.attributes
    )
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert '<meta http-equiv="refresh"' in page


def test_a_healthy_agent_says_so_first_and_what_can_be_restored() -> None:
    text = words(render(healthy()))
    assert text.index("All is well") < text.index("What can be restored") < text.index("Archiving now")
    assert "2026-11-16 02:18:12 UTC" in text
    assert "2026-11-23 09:29:53 UTC" in text
    assert "000000010000000200000118" in text
    assert "full + 7 deltas" in text
    assert text.count("read 4 h 00 min ago") == 7
    assert text.count("listed") == 1
    assert "Next base backup: 2026-11-24 02:00:00 UTC" in text


def test_what_another_cluster_has_archived_is_not_told_as_what_can_be_restored_of_this_server() -> None:
    status = healthy()
    assert status.store is not None
    page = Document(render(replace(status, store=replace(status.store, foreign="the repository belongs to another"))))
    assert "What can be restored here is another database cluster's" in page.text
    assert "Restorable up to" not in page.text


def test_a_base_backup_with_corrupt_pages_says_so() -> None:
    status = healthy()
    catalog = (replace(status.backups.catalog[0], corrupt_pages=3), *status.backups.catalog[1:])
    text = words(render(replace(status, backups=replace(status.backups, catalog=catalog))))
    assert text.count(f"{catalog[0].name} 3 corrupt pages") == text.count("corrupt pages") == 1


def test_what_is_wrong_comes_before_everything_else_with_what_to_do() -> None:
    status = broken()
    text = words(render(status))
    assert f"{len(status.findings)} problems" in text
    for finding in status.findings:
        assert text.index(" ".join(finding.text.split())) < text.index("What can be restored")
        assert finding.what_to_do in text
    assert "WAL missing: 000000010000000200000070 to 000000010000000200000078, 9 segments" in text


def test_an_empty_repository_is_not_called_well() -> None:
    text = words(render(empty()))
    assert "All is well" not in text
    assert "Nothing: there is no base backup with the WAL that it needs." in text
    assert "Waiting: the first WAL file is to be archived" in text


def test_what_is_not_known_yet_is_not_called_absent() -> None:
    text = words(render(starting()))
    assert "Starting" in text
    assert "Not known yet: the repository has not been read since the agent started." in text
    assert "Nothing" not in text


def test_a_running_base_backup_shows_how_far_it_is() -> None:
    text = words(render(running()))
    assert "copying files: 45 %" in text
    assert "41.0 GiB of 92.0 GiB, 118.0 MiB/s, 7 min 23 s left" in text


def test_names_that_attack_the_browser_are_shown_as_text() -> None:
    page = render(hostile())
    assert HOSTILE not in page
    assert page.count("</style>") == 1
    assert words(page).count(" ".join(HOSTILE.split())) >= 14
    assert "49" not in words(page).split(HOSTILE)[0]  # no template within a template


def test_the_only_style_that_the_browser_may_apply_is_the_pages() -> None:
    style = re.search(r"<style>(.*?)</style>", render(healthy()), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = HEADERS["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("status", [healthy, broken, running])
def test_what_is_drawn_lies_within_the_drawing(status: Callable[[], AgentStatus]) -> None:
    drawing = draw(status())
    assert isinstance(drawing, Drawing)
    for row in drawing.rows:
        for bar in (*row.restorable, *row.wal, *row.gaps):
            assert bar.width > 0
            assert 0 <= bar.left <= bar.left + bar.width <= 100.001
        assert all(0 <= mark.left <= 100 for mark in row.backups)
    assert 1 <= len(drawing.ticks) <= 5


def test_a_gap_is_drawn_between_what_can_be_restored_and_the_latest_timeline_comes_first() -> None:
    drawing = draw(broken())
    assert drawing is not None
    assert [row.timeline for row in drawing.rows] == [2, 1]
    latest = drawing.rows[0]
    (gap,), (before, after) = latest.gaps, latest.restorable
    assert before.left + before.width <= gap.left + 0.01
    assert gap.left + gap.width <= after.left + 0.01


def test_a_chain_that_lacks_its_full_backup_is_called_broken() -> None:
    catalog = week()
    lost = catalog[-1].name
    assert set(chains(catalog[:-1]).values()) == {f"broken: {lost} is missing"}
    assert chains(catalog)[lost] == "full"


async def test_the_page_is_served_beside_the_metrics_that_say_the_same() -> None:
    metrics = Metrics(CollectorRegistry())
    runner = web.AppRunner(http_application(metrics, lambda: True, broken))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with ClientSession() as session:
            async with session.get(f"http://{host}:{port}/") as answer:
                assert answer.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
                assert "problems" in await answer.text()
            async with session.get(f"http://{host}:{port}/metrics") as answer:
                text = await answer.text()
    finally:
        await runner.cleanup()
    critical = sum(finding.severity == "critical" for finding in broken().findings)
    assert f'pitr_findings{{severity="critical"}} {critical}.0' in text
    assert "pitr_repository_failing_seconds 2340.0" in text
    assert 'pitr_agent_info{mode="archive",version="0.1.0"} 1.0' in text


@pytest.mark.parametrize("restore", [None, RESTORE, replace(RESTORE, stage=None, backup=None, target=None)])
def test_in_restore_mode_the_page_tells_plan_stage_and_progress(restore: RestoreStatus | None) -> None:
    awaited = AwaitedWal("000000010000000000000003", NOW, 4)
    page = render(RestoreModeStatus("restore", "0.1.0", NOW, NOW, restore, awaited))
    assert "script" not in Document(page).tags
    assert HOSTILE not in page
    if restore is RESTORE:
        assert "replaying: 50 %" in words(page)
        assert "4.0 MiB/s, 2.0 s left" in words(page)
        assert "WAL handed to PostgreSQL up to 0/2000000, the plan ends at 0/3000000" in words(page)
        assert "hydrating took 20.0 s" in words(page)
        assert "Recovery waits for 000000010000000000000003 since" in words(page)
        assert "attempt 4" in words(page)


@pytest.mark.parametrize("restore", [None, RESTORE])
def test_in_restore_mode_the_page_tells_that_the_store_is_away(restore: RestoreStatus | None) -> None:
    away = StoreStatus(NOW, NOW - timedelta(minutes=3), HOSTILE, None, None)
    status = RestoreModeStatus("restore", "0.1.0", NOW, NOW, restore, store=away)
    assert "The store has not answered for 3 min 00 s" in words(render(status))
    assert HOSTILE not in render(status)
    back = replace(status, store=replace(away, failing_since=None, reason=""))
    assert "has not answered" not in render(back)
