"""HTTP servers that do not do what an S3 server does: they redirect, never answer, or take their
time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


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


def holds(
    objects: dict[str, bytes],
    spoil: Callable[[str, str, int, bytes], bytes | None] = lambda *_: None,
) -> Callable[[Any, str], None]:
    """A server with these objects in bucket `data`, but for what `spoil` answers instead: it is
    given the method, the key, where the range begins (-1: none), and the right answer.
    """

    def answer(connection: Any, request: str) -> None:
        method, target, _ = request.split("\r\n")[0].split(" ")
        address = urlsplit(target)
        key = unquote(address.path).removeprefix("/data").removeprefix("/")
        asked = re.search(r"\r\nrange: bytes=(\d+)-(\d+)", request, re.IGNORECASE)
        start = int(asked[1]) if asked else -1
        if not key:
            (prefix,) = parse_qs(address.query).get("prefix", [""])
            right = respond("200 OK", body=listing(objects, prefix))
        elif key not in objects:
            right = respond("404 Not Found")
        else:
            data = objects[key]
            headers = [f"ETag: {etag(data)}", "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT"]
            if method == "HEAD":
                right = respond("200 OK", *headers, body=data).partition(b"\r\n\r\n")[0]
                right += b"\r\n\r\n"
            elif asked:
                part = data[start : int(asked[2]) + 1]
                span = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
                right = respond("206 Partial", *headers, f"Content-Range: {span}", body=part)
            else:
                right = respond("200 OK", *headers, body=data)
        spoiled = spoil(method, key, start, right)
        connection.sendall(right if spoiled is None else spoiled)

    return answer


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def listing(objects: dict[str, bytes], prefix: str) -> bytes:
    found = [
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{etag(data)}</ETag><Size>{len(data)}</Size></Contents>"
        for key, data in sorted(objects.items())
        if key.startswith(prefix)
    ]
    body = f"<KeyCount>{len(found)}</KeyCount>{''.join(found)}"
    return f'<?xml version="1.0"?><ListBucketResult>{body}</ListBucketResult>'.encode()
