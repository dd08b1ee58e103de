"""What the engine's thread has for one request, on its way to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from flame_composer.serve.engine import Event, Failure

MOST_EVENTS = 4096  # that wait for a slow reader


class Inbox:
    """The events of one request, in order.

    If more than MOST_EVENTS wait to be read, the request fails: memory is not what a slow reader
    may take.
    """

    def __init__(self) -> None:
        """Create the inbox of a request; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()

    def deliver(self, event: Event) -> None:
        """Add an event; any thread may call this."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._add, event)

    def _add(self, event: Event) -> None:
        if len(self._events) >= MOST_EVENTS:
            self._events.clear()
            event = Failure(503, "the answer is read too slowly")
        self._events.append(event)
        self._changed.set()

    async def get(self) -> Event:
        """Return the next event, once there is one."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()
