"""A small client of the DevTools protocol: one page of a headless Chromium, driven as a person would, by keys and mouse."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
]

KEYS = {"Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Backspace": 8}


class Browser:
    """One page."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.messages: list[str] = []  # of the console, errors and what the content policy stopped
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=30))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(json.dumps(message["params"]))
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 10) -> bool:
        """Wait until an expression is true; pages that are on their way are no error."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := self.value(f"!!({expression})"):
                    return found
            except AssertionError:
                pass
            assert time.monotonic() < end, (
                f"never true: {expression}; the page says {self.value('document.body.innerText')[-300:]!r}"
            )
            time.sleep(0.02)

    def open(self, address: str) -> None:
        """Go to a page and wait until it, or where it leads, is there."""
        self.value("window.left = true")
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && !window.left")

    def press(self, *keys: str) -> None:
        """Keys, one after another."""
        for key in keys:
            code = KEYS.get(key) or ord(key.upper())
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            about = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is on the screen."""
        box = f"(e => {{ const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})({selector})"
        x, y = self.value(box)
        return x, y

    def drag(self, start: str, end: str) -> None:
        """Press the mouse on one element and let it go on another (expressions)."""
        (x, y), (to_x, to_y) = self.middle(start), self.middle(end)
        steps = [("mousePressed", x, y), ("mouseMoved", (x + to_x) / 2, (y + to_y) / 2), ("mouseMoved", to_x, to_y)]
        for kind, *place in [*steps, ("mouseReleased", to_x, to_y)]:
            about = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1, "buttons": int(kind != "mouseReleased")}
            self.call("Input.dispatchMouseEvent", type=kind, **about)

    def screen(self, width: int, height: int) -> None:
        """The size of the screen."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path, *, dark: bool = False) -> None:
        """A screenshot."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.3)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser of its own, with an empty profile under a folder."""
    from websockets.sync.client import connect

    profile = folder / "profile"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        file, end = profile / "DevToolsActivePort", time.monotonic() + 30
        while not (file.is_file() and len(file.read_text().splitlines()) > 1):
            assert process.poll() is None, f"the browser ended with {process.returncode}"
            assert time.monotonic() < end, "the browser did not open its port"
            time.sleep(0.05)
        port = file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.kill()
        process.wait()
