"""The status page in a real browser: drawn as meant, on a phone and at night, and deaf to what attacks it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from agent.server.http import http_application
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import AgentStatus
from tests.support.browser import Browser, needs_chromium, running_browser
from tests.support.statuses import broken, empty, healthy, hostile, running, starting

pytestmark = needs_chromium
PHONE, DESKTOP = 390, 1280
HEADER = "getComputedStyle(document.querySelector('header')).backgroundColor"
INK = "getComputedStyle(document.querySelector('h1')).color"
CLIPPED = "[...document.querySelectorAll('section, header')].some(each => each.scrollWidth > each.clientWidth)"
ROWS = "document.querySelectorAll('tbody tr').length"
PAPER = "getComputedStyle(document.body).backgroundColor"


@asynccontextmanager
async def served(status: Callable[[], AgentStatus]) -> AsyncIterator[str]:
    """Serve the page of `status` as an agent does; yield its address."""
    runner = web.AppRunner(http_application(Metrics(CollectorRegistry()), lambda: True, status))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with running_browser(tmp_path / "profile") as browser:
        yield browser


async def test_the_page_fits_phone_and_desktop_by_day_and_night_and_the_browser_has_nothing_to_object(
    browser: Browser,
) -> None:
    for status in (healthy, running, broken, empty, starting, hostile):
        async with served(status) as url:
            paper = {}
            for width, dark in ((PHONE, False), (PHONE, True), (DESKTOP, False)):
                await browser.show(url, width=width, dark=dark)
                assert await browser.value("document.documentElement.scrollWidth") <= width, status
                assert status is hostile or not await browser.value(CLIPPED), status
                assert await browser.value(INK) == "rgb(255, 255, 255)"
                paper[dark] = await browser.value(PAPER)
            assert paper[True] != paper[False]
    assert browser.complaints == []


async def test_the_first_thing_on_a_phone_is_what_is_wrong_and_its_colour_says_how_bad(browser: Browser) -> None:
    async with served(healthy) as url:
        await browser.show(url, width=PHONE, dark=False)
        assert await browser.value(HEADER) == "rgb(26, 127, 55)"
    async with served(broken) as url:
        await browser.show(url, width=PHONE, dark=False)
        assert await browser.value(HEADER) == "rgb(179, 32, 42)"
        assert await browser.value("document.querySelector('.finding').getBoundingClientRect().bottom") < 900


async def test_the_time_line_is_drawn_to_scale(browser: Browser) -> None:
    async with served(broken) as url:
        await browser.show(url, width=DESKTOP, dark=False)
        for shape in ("rect.restorable", "rect.wal", "rect.gap", "path.backup"):
            box = f"document.querySelector('figure {shape}').getBoundingClientRect()"
            assert await browser.value(f"{box}.width") > 0, shape
            assert await browser.value(f"{box}.right") <= DESKTOP, shape


async def test_names_that_attack_the_browser_neither_run_nor_load_anything(browser: Browser) -> None:
    async with served(hostile) as url:
        await browser.show(url, width=DESKTOP, dark=False)
        assert await browser.value("document.querySelectorAll('script, img, iframe').length") == 0
        assert "<script>alert('1')</script>" in await browser.value("document.body.innerText")
    assert browser.complaints == []


async def test_older_base_backups_stay_shown_when_the_page_renews_itself(browser: Browser) -> None:
    def many() -> AgentStatus:
        status = running()
        return replace(status, backups=replace(status.backups, catalog=status.backups.catalog * 40))

    async with served(many) as url:
        await browser.show(url, width=PHONE, dark=True)
        assert await browser.value(ROWS) == 10
        await browser.click("section p a")
        assert await browser.value(ROWS) == 200
        assert "pitr backup list" in await browser.value("document.body.innerText")
        await browser.renewed()
        assert await browser.value(ROWS) == 200
        await browser.click("section p a")
        assert await browser.value(ROWS) == 10
    assert browser.complaints == []
