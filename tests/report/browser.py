"""A headless Chromium, driven over its debugging pipe: no further package, no network port."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a Chromium; `messages` collects what its console and its network said."""

    def __init__(self, folder: Path, limit: float = 60.0) -> None:
        binary = find_browser()
        assert binary is not None
        self.limit, self._count, self._buffer = limit, 0, b""
        self.messages: list[str] = []
        self.requests: list[str] = []
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [
            os.dup(theirs_in),
            os.dup(theirs_out),
        ]  # clear of 3 and 4, which the shell takes from them

        command = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
        with open(folder / "chromium.log", "wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", command, binary, *FLAGS, f"--user-data-dir={folder / 'profile'}"],
                pass_fds=high,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        mine = self._count
        while True:
            answer = self._receive()
            if answer.get("id") == mine:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + self.limit
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "the browser said nothing"
            self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        answer = json.loads(raw)
        params = answer.get("params", {})
        match answer.get("method"):
            case "Runtime.consoleAPICalled":
                self.messages.append(
                    str([arg.get("value", arg.get("description")) for arg in params["args"]])
                )
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(params["exceptionDetails"])[:500])
            case "Log.entryAdded":
                self.messages.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True
        return answer

    def open(
        self,
        path: Path,
        *,
        width: int = 1280,
        height: int = 900,
        media: str = "screen",
        scheme: str = "light",
        script: bool = True,
    ) -> None:
        """Shows a file once it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Value of an expression in the page, awaited if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def height(self) -> int:
        """Height of the whole page, in pixels."""
        return int(self.call("Page.getLayoutMetrics")["cssContentSize"]["height"])

    def screenshot(self, top: int = 0, height: int | None = None) -> bytes:
        """A PNG of the page from `top` on; of more than 16,384 pixels of height Chromium draws
        nothing."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": top,
            "width": size["width"],
            "height": min(height or 1 << 30, size["height"] - top),
            "scale": 1,
        }
        shot = self.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        return base64.b64decode(shot["data"])

    def pdf(self, path: Path) -> None:
        """As it prints, with the style sheet of print."""
        self.call("Emulation.setEmulatedMedia", media="")
        path.write_bytes(
            base64.b64decode(
                self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"]
            )
        )

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        for fd in (self._in, self._out):
            os.close(fd)
