"""A real browser, spoken to by its DevTools protocol."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse

from tests.support.until import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_START_SECONDS = 60.0
_ANSWER_SECONDS = 60.0
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Browser:
    """One tab. `complaints` are what the browser logged, or asked its user, about the pages it was shown."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._loaded = False

    async def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Call a method of the protocol; return its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(_ANSWER_SECONDS):
            while (message := await self._socket.receive_json()).get("id") != number:
                self._take_note(message)
        assert "error" not in message, message
        result: Mapping[str, Any] = message["result"]
        return result

    async def show(self, url: str, *, width: int, dark: bool) -> None:
        """Load a page on a screen that is so wide; return when it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self._loaded = False
        await self.call("Page.navigate", url=url)
        await self._until_loaded()

    async def click(self, selector: str) -> None:
        """Click on a link; return when what it leads to is drawn."""
        self._loaded = False
        await self.value(f"document.querySelector({selector!r}).click()")
        await self._until_loaded()

    async def renewed(self) -> None:
        """Return when the page has loaded itself again."""
        self._loaded = False
        await self._until_loaded()

    async def _until_loaded(self) -> None:
        async with asyncio.timeout(_ANSWER_SECONDS):
            while not self._loaded:
                self._take_note(await self._socket.receive_json())

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page, which has no script of its own."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _take_note(self, event: Mapping[str, Any]) -> None:
        match event["method"]:
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded":
                self.complaints.append(event["params"]["entry"]["text"])
            case "Page.javascriptDialogOpening" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(str(event))


async def _find_tab(session: ClientSession, port: str) -> str:
    """Return the address of the tab that opens once the browser runs."""
    async with asyncio.timeout(_START_SECONDS):
        while True:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                for each in await answer.json():
                    if each["type"] == "page":
                        return str(each["webSocketDebuggerUrl"])


@asynccontextmanager
async def running_browser(directory: Path) -> AsyncIterator[Browser]:
    """A browser whose profile is in `directory`; it ends with the context."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *_OPTIONS, f"--user-data-dir={directory}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        told = directory / "DevToolsActivePort"
        await until(lambda: told.exists() and bool(told.read_text()), what="chromium's port", seconds=_START_SECONDS)
        port = await asyncio.to_thread(lambda: told.read_text().split()[0])
        async with (
            ClientSession() as session,
            session.ws_connect(await _find_tab(session, port), max_msg_size=0) as socket,
        ):
            browser = Browser(socket)
            for domain in ("Page", "Log", "Runtime"):
                await browser.call(f"{domain}.enable")
            yield browser
    finally:
        process.kill()
        await process.wait()
