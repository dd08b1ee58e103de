"""A server in a process of its own, and what tests ask of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from openai import OpenAI

from tests.runs import Script

KEY = "a key for tests 0123456789"[6:].replace(" ", "-")


class Server:
    """recipes/serve.py on a port that is free."""

    def __init__(
        self,
        model: Path | str,
        *keys: str,
        env: dict[str, str] | None = None,
        script: Path | str = "recipes/serve.py",
        port: int = 0,
    ):
        self.script = Script(script, f"model={model}", f"port={port}", *keys, env=env)
        deadline = time.monotonic() + 300
        while " is served at " not in self.script.read("out"):
            assert self.script.process.is_alive(), self.script.read("err")
            assert time.monotonic() < deadline, self.script.read("err")
            time.sleep(0.02)
        self.url = self.script.read("out").split(" is served at ")[1].split()[0]
        self.address = (urlsplit(self.url).hostname or "", urlsplit(self.url).port or 0)
        self.key = (env or {}).get("SERVE_KEY", "unused")

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(
            base_url=self.url,
            **{"api_key": self.key, "max_retries": 0, "timeout": 300, **options},
        )

    def ask(
        self,
        body: Any = None,
        path: str = "/v1/completions",
        method: str | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the body that a request is answered with.

        `body` is sent as JSON, unless it is bytes.
        """
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            verb = method or ("GET" if body is None else "POST")
            connection.request(verb, path, sent, {k: v for k, v in given.items() if v})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def raw(self, sent: bytes) -> socket.socket:
        """A connection on which these bytes were sent."""
        connection = socket.create_connection(self.address, timeout=120)
        connection.sendall(sent)
        return connection

    def post(self, body: Any, path: str = "/v1/completions") -> socket.socket:
        """A connection on which a request was sent."""
        return self.raw(self.request(body, path))

    def request(self, body: Any, path: str = "/v1/completions") -> bytes:
        """The bytes of a request."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def gauge(self, name: str) -> float:
        """A number of /metrics."""
        lines = self.ask(path="/metrics")[2].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def wait_for(self, name: str, number: float) -> None:
        """Until a number of /metrics is this one."""
        deadline = time.monotonic() + 60
        while self.gauge(name) != number:
            assert time.monotonic() < deadline, f"{name} is {self.gauge(name)}"
            time.sleep(0.02)

    def logged(self, start: int) -> str:
        """Return the line of log that begins at `start`; it comes just after the answer."""
        until = time.monotonic() + 60
        while "\n" not in (found := self.script.read("err")[start:]):
            assert time.monotonic() < until
            time.sleep(0.01)
        [line] = found.splitlines()
        return line

    def threads(self) -> int:
        return psutil.Process(self.script.process.pid).num_threads()

    def end(self) -> Any:
        """Send SIGTERM, and return what the process came to."""
        pid = self.script.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        return self.script.wait()
