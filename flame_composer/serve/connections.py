"""The server process: connections that end in time, and an end that finishes what is under way."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flame_composer.errors import InvalidField, one_line
from flame_composer.quantities import plural

if TYPE_CHECKING:
    from flame_composer.serve.engine import Engine

HEAD_SECONDS = 30  # for the head of a request to arrive
READ_SECONDS = 60  # for a client to read what was sent to it
MOST_CONNECTIONS = 500
_AFTER_DRAINING = 5  # seconds for the last words of a request
_LAST_WORDS = 1  # the same, if the server is to end at once


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address, but does not listen yet.

    Raise InvalidField if the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InvalidField("host", f"is no address of this machine: {one_line(error)}") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        reason = error.strerror or one_line(error)
        raise InvalidField("port", f"cannot be had at {host}: {reason}; set another port") from None
    return found


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach the address of a socket."""
    host = str(listener.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def address_of(listener: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def page_of(listener: socket.socket) -> str:
    """Return a URL of the page that a browser on this machine opens.

    Some refuse 0.0.0.0, which is no address of a machine.
    """
    host, port = listener.getsockname()[:2]
    return f"http://localhost:{port}" if host in ("0.0.0.0", "::") else address_of(listener)


class Connection(H11Protocol):
    """A connection that is cut if the client neither sends nor reads for too long.

    There is a limit to their number, too: each takes memory, and a file of the process.

    Upstream: uvicorn 0.54, `protocols.http.h11_impl.H11Protocol`, which waits for ever for the head
        of a request and for a client to read.
    Mends: whoever sends half a request, or reads nothing, would hold a connection until the process
        has no more files.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:  # the first byte of another request
            self._await_head()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head is there
            self._stop_awaiting()

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_awaiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def pause_writing(self) -> None:
        """Begin to count the time that the client does not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    _unread: asyncio.TimerHandle | None = None

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        super().resume_writing()
        self._stop_counting()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_counting()
        self._stop_awaiting()

    def _stop_counting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Server(uvicorn.Server):
    """A server that ends quietly at SIGTERM and Ctrl-C; a second Ctrl-C makes it hurry."""

    hurries = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.hurries = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(
    app: Any,
    listener: socket.socket,
    engine: Engine,
    *,
    drain_seconds: float,
    announce: Callable[[], Any],
) -> None:
    """Serve requests until SIGTERM or Ctrl-C, then finish those under way, and return.

    `announce` is called once requests are taken. What is not finished after `drain_seconds` fails
    with an error that says so.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + _AFTER_DRAINING,
    )
    try:
        asyncio.run(_serve(_Server(config), listener, engine, drain_seconds, announce))
    finally:
        engine.close("the server has ended")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _serve(
    server: _Server,
    listener: socket.socket,
    engine: Engine,
    drain_seconds: float,
    announce: Callable[[], Any],
) -> None:
    async def drain() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        announce()
        while not server.should_exit:
            await asyncio.sleep(0.05)
        engine.is_draining = True
        gauges = engine.gauges()
        if count := sum(gauges.values()):
            _say(
                f"ending: {plural(count, 'answer')} under way, for which there"
                f" {'is' if drain_seconds == 1 else 'are'} {drain_seconds:g} s; Ctrl-C (again)"
                " ends at once"
            )
        end = time.monotonic() + drain_seconds
        while time.monotonic() < end and not server.hurries:
            await asyncio.sleep(0.05)
        if count := sum(engine.gauges().values()):
            _say(f"{plural(count, 'answer')} ended before the end")
        await asyncio.to_thread(engine.close, "the server ends before the answer does")
        await asyncio.sleep(_LAST_WORDS)
        server.force_exit = server.hurries

    draining = asyncio.create_task(drain())
    await server.serve(sockets=[listener])
    draining.cancel()
