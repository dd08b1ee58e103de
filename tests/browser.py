"""A real browser, Debian's Chromium, driven over W3C WebDriver's HTTP by its chromedriver. A pytest
plugin.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of a reference in WebDriver's JSON
ENTER, SHIFT, ESCAPE, NO_MORE = "\ue007", "\ue008", "\ue00c", "\ue000"
SECONDS = 60


def missing() -> str | None:
    """Why there can be no browser here."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: chromium chromium-driver)"
    return None


class Browser:
    """A window of a browser; its elements are named by CSS selectors."""

    def __init__(self, port: int, profile: Path):
        self.port = port
        arguments = [
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--no-sandbox",  # which root cannot have
            "--no-proxy-server",
            "--lang=en-US",
            f"--user-data-dir={profile}",
        ]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        asked = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.path = ""
        begun = self.call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        self.path = f"/session/{begun['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, f"{self.path}{path}", content)
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns that runs in the page, with `arguments`."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def find(self, selector: str) -> str:
        asked = {"using": "css selector", "value": selector}
        return f"/element/{self.call('POST', '/element', asked)[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.call("POST", f"{self.find(selector)}/click", {})

    def write(self, selector: str, text: str) -> None:
        """Type a text, key by key."""
        self.call("POST", f"{self.find(selector)}/value", {"text": text})

    def fill(self, selector: str, text: str) -> None:
        """Type a text in place of what a field holds."""
        self.call("POST", f"{self.find(selector)}/clear", {})
        if text:
            self.write(selector, text)

    def text(self, selector: str) -> str:
        """What is seen of an element, as one reads it."""
        return self.call("GET", f"{self.find(selector)}/text")

    def is_seen(self, selector: str) -> bool:
        return self.call("GET", f"{self.find(selector)}/displayed")

    def wait(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Until a condition holds; return what it gives."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.03)
        return found

    def resize(self, width: int, height: int, *, is_phone: bool = False, scale: float = 1) -> None:
        size = {"width": width, "height": height, "mobile": is_phone}
        self.devtools("Emulation.setDeviceMetricsOverride", deviceScaleFactor=scale, **size)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def prefer(self, scheme: str) -> None:
        """Prefer `light` or `dark`."""
        wish = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[wish])

    def speak(self, language: str) -> None:
        """Ask for pages in a language, as in the browser's settings."""
        agent = self.run("return navigator.userAgent")
        self.devtools("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def logged(self) -> list[str]:
        """The lines in the browser's console since the last call, violated policies among them."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        entries = self.call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self.call("DELETE", "")


@pytest.fixture(scope="session")
def chromedriver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of chromedriver."""
    if reason := missing():
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("browser") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=output,
            stderr=output,
            env={**os.environ, "HOME": str(log.parent)},
        )
    try:
        end = time.monotonic() + SECONDS
        while "started successfully" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def browser(chromedriver: int, tmp_path: Path) -> Iterator[Browser]:
    """A new window without history, as large as a small notebook's."""
    browser = Browser(chromedriver, tmp_path / "profile")
    browser.resize(1200, 800)
    yield browser
    browser.close()
