"""Clients of a server that take turns or come together, and when each piece of an answer came."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from flame_composer.errors import DataError


@dataclass
class Answered:
    """A streamed answer, and when it was asked for and came, in seconds of one clock."""

    asked: float = 0.0
    came: list[float] = field(default_factory=list)  # pieces of text, most of them one token
    text: str = ""
    tokens: int = 0

    @property
    def to_first(self) -> float:
        """The time to the first piece of text."""
        return self.came[0] - self.asked

    def between(self) -> Iterator[float]:
        """Yield the time between each two pieces of text."""
        for before, after in pairwise(self.came):
            yield after - before


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def answers(
    address: tuple[str, int], requests: Sequence[Mapping[str, Any]], at_a_time: int
) -> tuple[float, list[Answered]]:
    """Send requests to /v1/completions; return the seconds that all took, and their answers.

    There are `at_a_time` clients, each of which sends the next request once it has its answer.
    Raise DataError if a request is refused or its answer ends early.
    """
    return asyncio.run(_answers(address, requests, at_a_time))


async def _answers(
    address: tuple[str, int], requests: Sequence[Mapping[str, Any]], at_a_time: int
) -> tuple[float, list[Answered]]:
    found = [Answered() for _ in requests]
    rest = iter([*zip(requests, found, strict=True)])

    async def client() -> None:
        for request, answered in rest:
            await _ask(address, request, answered)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_a_time)))
    return time.perf_counter() - started, found


async def _ask(address: tuple[str, int], request: Mapping[str, Any], answered: Answered) -> None:
    streamed = {**request, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(streamed).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n"
    )
    answered.asked = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head.encode() + content)
    lines = []
    try:
        while line := await reader.readline():
            lines.append((time.perf_counter(), line))
    finally:
        writer.close()
    _note(lines, answered)


def _note(lines: Sequence[tuple[float, bytes]], answered: Answered) -> None:
    """Take the lines of a response, with the times when they came, into the answer."""
    events = [(at, line[6:]) for at, line in lines if line.startswith(b"data: ")]
    if not events or events[-1][1].strip() != b"[DONE]":
        last = lines[-1][1].decode(errors="replace").strip() if lines else "no answer"
        raise DataError(f"the server did not answer whole: {last[:200]}")
    for at, content in events[:-1]:
        event = json.loads(content)
        for choice in event["choices"]:
            answered.text += choice["text"]
            if choice["text"]:
                answered.came.append(at)
        if event["usage"] is not None:
            answered.tokens = event["usage"]["completion_tokens"]
