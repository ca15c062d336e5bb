"""A real Chromium over its own debugging protocol: go somewhere, wait for a text, click, take a picture."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60  # the longest wait for a page


class ProtocolError(Exception):
    """The browser refused a call."""


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, loop: asyncio.AbstractEventLoop) -> None:
        self._socket, self._loop, self._number = socket, loop, 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = json.loads((await self._socket.receive(timeout=SECONDS)).data)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise ProtocolError(answer["error"])
                return answer["result"]

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def go(self, address: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=address)

    def text(self) -> str:
        """Return what a reader sees; nothing while one page gives way to the next."""
        with suppress(ProtocolError):
            return str(self.run("document.body ? document.body.innerText : ''"))
        return ""

    def wait(self, *words: str) -> str:
        """Wait until all words are on the page; return its text."""
        self.until(lambda: all(word in self.text() for word in words), lambda: f"{words} not in:\n{self.text()[:3000]}")
        return self.text()

    def until(self, true: Callable[[], Any], problem: Callable[[], str]) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, problem()
            time.sleep(0.1)

    def picture(self, file: Path, *, height: int = 900) -> Path:
        """Take a picture of the top of the page, in few colours so that it is small."""
        from PIL import Image

        clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))
        Image.open(file).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)
        return file


@contextmanager
def browser(profile: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Give a page of a browser that is ended with the block."""
    command = [
        str(PROGRAM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}",
        "--disable-background-networking", "--disable-component-update", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        session, socket = loop.run_until_complete(_connect(profile, process))
        page = Page(socket, loop)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        try:
            yield page
        finally:
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
    finally:
        loop.close()
        process.terminate()
        process.wait(20)


async def _connect(profile: Path, process: subprocess.Popen) -> Any:
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + SECONDS
    while not (port_file.exists() and port_file.read_text().strip()):
        assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
        await asyncio.sleep(0.05)
    port = port_file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as answer:
        target = next(one for one in json.load(answer) if one["type"] == "page")
    session = aiohttp.ClientSession()  # one socket for the whole visit
    return session, await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
