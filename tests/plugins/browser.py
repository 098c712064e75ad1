"""A headless Chromium that a test drives by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 60
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--no-default-browser-check"),
    *("--remote-debugging-port=0", "--window-size=900,700", "about:blank"),
)


def program() -> str | None:
    """Where a Chromium is."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """The page of a browser."""

    def __init__(self, socket: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._socket, self._loop = socket, loop
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(SECONDS):
            while True:
                row = await self._socket.receive_json()
                if row.get("id") == number:
                    assert "error" not in row, row
                    return dict(row["result"])
                self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        params = row.get("params", {})
        if row.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif row.get("method") == "Log.entryAdded":
            if params["entry"]["level"] in ("warning", "error"):
                self.complaints.append(params["entry"]["text"])
        elif row.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + SECONDS
        while not (found := self.js(expression)):
            assert time.monotonic() < end, f"{expression} stays {found!r}; {self.complaints}"
            time.sleep(0.05)
        return found

    def show(self, width: int, theme: str) -> None:
        """Give the window a width in CSS pixels, and the theme that its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.js("scrollTo(0, 0)")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        codes = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
        code, text = codes[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                windowsVirtualKeyCode=code,
            )  # fmt: skip

    def picture(self, path: Path, *, height: int | None = None, scale: float = 1) -> None:
        """Write the page as PNG, from its top down to ``height``, by default all of it."""
        width, whole = self.js("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole)}
        clip["scale"] = scale
        found = self.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def opened_page(url: str, folder: Path) -> Iterator[Page]:
    """A page at ``url``, in a browser whose profile is in ``folder``."""
    import aiohttp

    found = program()
    assert found is not None
    home = folder / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(home)}
    command = [found, f"--user-data-dir={folder / 'profile'}", *FLAGS]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    loop = asyncio.new_event_loop()
    try:
        place = folder / "profile" / "DevToolsActivePort"
        end = time.monotonic() + SECONDS
        while not place.exists() or len(place.read_text().split()) < 2:
            assert process.poll() is None, "the browser has ended"
            assert time.monotonic() < end, "the browser does not start"
            time.sleep(0.05)
        port = place.read_text().split()[0]

        async def connect() -> tuple[Any, Any]:
            session = aiohttp.ClientSession()
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                rows = await response.json(content_type=None)
            target = next(row for row in rows if row["type"] == "page")
            socket = await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
            return session, socket

        session, socket = loop.run_until_complete(connect())
        try:
            page = Page(socket, loop)
            page.call("Page.navigate", url=url)
            page.until("document.readyState === 'complete'")
            yield page
        finally:
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
    finally:
        process.kill()
        process.wait()
        loop.close()
