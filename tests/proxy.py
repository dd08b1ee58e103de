"""An HTTP proxy that stands in front of the S3 server and spoils some of its answers."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("503", "reset", "truncated", "flipped")


class Proxy(ThreadingHTTPServer):
    """Spoils a `rate` of the answers, chosen by `seed`: an error 503, a reset connection, half a
    body, a changed byte.

    Requests are passed on with the Host they were signed for. `requests` counts them by method and
    path, `num_bytes` those of the answers to them, `faults` by kind.
    """

    daemon_threads = True

    def __init__(self, endpoint: str, *, rate: float, seed: int, faults: tuple[str, ...] = FAULTS):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = urlsplit(endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.rate, self.kinds = rate, faults
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up on a spoiled answer is none of our business."""

    def fault(self, has_body: bool) -> str | None:
        with self.lock:
            if self.random.random() >= self.rate:
                return None
            # Each in its turn.
            kinds = [kind for kind in self.kinds if has_body or kind in ("503", "reset")]
            kind = min(kinds, key=lambda kind: self.faults[kind], default=None)
            if kind is not None:
                self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        with self.server.lock:
            self.server.requests[f"{self.command} {urlsplit(self.path).path}"] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command == "GET" and "list-type=" not in self.path)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "503":
            self.close_connection = True
            content = (
                b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
            )
            self.answer(
                503,
                {"Content-Type": "application/xml", "Content-Length": str(len(content))},
                content,
            )
            return
        upstream = http.client.HTTPConnection(self.server.address, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        headers = {
            name: value
            for name, value in response.getheaders()
            if name.lower() != "transfer-encoding"
        }
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(content))
        with self.server.lock:
            self.server.num_bytes[f"{self.command} {urlsplit(self.path).path}"] += len(content)
        if fault == "truncated":
            self.close_connection = True
            content = content[: len(content) // 2]
        if fault == "flipped" and response.status in (200, 206) and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.answer(response.status, headers, content)

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def proxy(
    endpoint: str, *, rate: float, seed: int = 0, faults: tuple[str, ...] = FAULTS
) -> Iterator[Proxy]:
    server = Proxy(endpoint, rate=rate, seed=seed, faults=faults)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
