"""HTTP servers that do not do what an S3 server does: they redirect, never answer, or take their
time.
"""

from __future__ import annotations

import contextlib
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Hostile(socketserver.ThreadingTCPServer):
    """Answers every request by `answer`, which is given the connection and the request's first
    bytes; counts them.
    """

    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, answer: Callable[[Any, str], None]):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answer = answer
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.BaseRequestHandler):
    server: Hostile

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while head := self.request.recv(1 << 16):
                request = head.decode(errors="replace")
                if request.split(" ")[0] not in ("GET", "HEAD", "PUT", "POST", "DELETE"):
                    continue  # of a body
                self.server.requests.append(request)
                if "Expect: 100-continue" in request:
                    self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.server.answer(self.request, request)


@contextlib.contextmanager
def hostile(answer: Callable[[Any, str], None]) -> Iterator[Hostile]:
    with Hostile(answer) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def silence(connection: Any, request: str) -> None:
    """Takes the connection, and never answers."""
    time.sleep(30)


def lists_only(then: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """An answer for the bucket's listing, so that it is taken for a server that works; `then`
    for all else.
    """
    body = b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>'

    def answer(connection: Any, request: str) -> None:
        if "list-type=2" in request.split("\r\n")[0]:
            connection.sendall(respond("200 OK", body=body))
        else:
            then(connection, request)

    return answer


def respond(status: str, *headers: str, body: bytes = b"") -> bytes:
    return (
        "\r\n".join(
            [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
        ).encode()
        + body
    )
