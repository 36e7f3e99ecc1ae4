"""A headless Chromium, driven by its DevTools protocol over pipes: what a page says, asks for, and looks like."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--remote-debugging-pipe", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
SECONDS = 90


class Browser:
    """One tab of a headless Chromium.

    Attributes:
        requests: the addresses that the page has asked for, other than its own and those within it.
        complaints: what it has written to the console, errors and violations of its policy included.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._rest, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # Everything that is asked for is stopped here and counted, but the page itself.
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = self._send(method, parameters)
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        """Load a page and wait until it is drawn."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.appear(dark)
        self.call("Page.navigate", url=page.as_uri())
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            tree = self.call("Page.getFrameTree")["frameTree"]["frame"]
            if tree["url"] == page.as_uri() and self.value("document.readyState") == "complete":
                return
            time.sleep(0.05)
        raise TimeoutError(f"{page} was not loaded in {SECONDS} s")

    def appear(self, dark: bool, media: str = "") -> None:
        """Let the system be light or dark, and the medium be the screen or `print`."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def picture(self, file: Path, whole: bool = True) -> None:
        """Write a PNG file of the whole page, or of what the window shows of it."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))

    def print(self, file: Path) -> None:
        """Print the page to a PDF file, A4."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(printed["data"]))

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._commands, rest) :]
        return self._number

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], SECONDS)[0], "Chromium does not answer"
            read = os.read(self._answers, 1 << 20)
            assert read, "Chromium has ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, parameters: dict[str, Any]) -> None:
        if event == "Fetch.requestPaused":
            address = parameters["request"]["url"]
            if address.startswith("file:") and parameters["resourceType"] == "Document":
                self._send("Fetch.continueRequest", {"requestId": parameters["requestId"]})
            else:
                self.requests.append(address)
                self._send(
                    "Fetch.failRequest", {"requestId": parameters["requestId"], "errorReason": "BlockedByClient"}
                )
        elif event == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:", "about:")) and address not in self.requests:
                self.requests.append(address)
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(part.get("value", part)) for part in parameters["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a new profile in a directory, and end it."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "chromium", CHROMIUM, *FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
